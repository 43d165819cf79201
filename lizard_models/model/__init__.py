"""A transformers decoder as a Lizard: conversion, attention, cache, state, families."""
