"""What the paper leaves open, A1 to A13, one line a reading (A7 is the table ``gates``)."""

from typing import Any

from benchmarks.quality.rows.declare import Row, Table


def form(name: str, about: str, *also: str, on: str = "base", **fields: Any) -> Row:
    """Another form of attention; on base, the first of ``fields`` is what it tells about. also: other tables."""
    field = f"attention.{next(iter(fields))}" if on == "base" else ""
    return Row(name=name, about=about, on=on, changes={"attention": fields}, field=field, also=also)


def recipe(name: str, about: str, stage: str, **fields: Any) -> Row:
    """Another way to train; the last of ``fields`` is what it tells about."""
    return Row(name=name, about=about, changes={stage: fields}, field=f"{stage}.{[*fields][-1]}")


TABLE = Table(
    name="choices",
    about="What the paper leaves open, A1 to A13: one line a reading (A7 is the table gates).",
    title="What the paper leaves open (A1 to A13)",
    rows=(
        form("A1-sink-linear", "sinks that add their logit itself, as printed", on="paper", sink_form="linear",
             sink_init=1.0, sink_spread=0.1),
        form("A3-no-denominator", "a linear branch that is not normalised", on="paper", normalize=False),
        form("A4-shared", "one pair of maps for all heads", feature_projection="shared"),
        form("A4-tied", "one map for queries and keys", tie_features=True),
        form("A4-query-head-keys", "a key map per query head", "retrieval", key_map="query_head"),
        form("A5-alpha-fixed", "the window weighs 1", on="paper", alpha="fixed"),
        form("A5-alpha-per-head", "a learned weight per head", on="paper", alpha="per_head"),
        form("A8-features-64", "64 features", feature_dim=64, feature_dim_counts="features"),
        form("A8-features-128", "128 features", feature_dim=128, feature_dim_counts="features"),
        form("features-512", "512 features", feature_dim=256),
        form("A9-sinks-per-head", "sinks per head", on="paper", sinks_per_head=True),
        form("A10-no-rope", "no RoPE in the window", window_rope=False),
        form("A10-linear-rope", "RoPE in the linear branch, too", linear_rope=True),
        form("A10-paper-rope", "RoPE in the window of paper", on="paper", window_rope=True),
        recipe("A11-adapters-alone", "new parameters held still in stage 2", "stage2", train_new_parameters=False),
        recipe("A12-before-o-proj", "stage 1 compares before the output projection", "stage1", target="heads"),
        recipe("A12-student-inputs", "stage 1 on the student's own stream", "stage1", inputs="student"),
        recipe("A12-mse", "stage 1 with plain squared error", "stage1", error="mse"),
        form("A13-all-keys", "the linear branch over all keys", coverage="all"),
        form("A13-paper-outside", "the linear branch of paper outside its window", on="paper", coverage="outside"),
        form("mix-sum", "branches added with a learned weight per head", mix="sum", merge_bias="none",
             alpha="per_head"),
        form("merge-bias-none", "a merge without bias", "parts", merge_bias="none"),
        form("merge-bias-head", "a merge with a bias per head alone", merge_bias="head"),
        recipe("stage2-ce", "cross-entropy in place of KL", "stage2", cross_entropy_weight=1.0, kl_weight=0.0),
    ),
)  # fmt: skip
