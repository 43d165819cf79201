"""Evaluation of a Lizard model beside its teacher and the window control."""

from lizard_models.evaluation.attention_error import AttentionErrors, attention_errors
from lizard_models.evaluation.passkey import passkey_accuracy, passkeys_found
from lizard_models.evaluation.position_loss import (
    PositionLoss,
    bucket_edges,
    divergence_by_position,
    loss_by_position,
    recovered_share,
)
from lizard_models.evaluation.report import Report, Row
from lizard_models.evaluation.stream import StreamReport, measure_stream, stream_losses
from lizard_models.files.environment import environment

__all__ = [
    "AttentionErrors",
    "PositionLoss",
    "Report",
    "Row",
    "StreamReport",
    "attention_errors",
    "bucket_edges",
    "divergence_by_position",
    "environment",
    "loss_by_position",
    "measure_stream",
    "passkey_accuracy",
    "passkeys_found",
    "recovered_share",
    "stream_losses",
]
