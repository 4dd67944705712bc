"""What is taken from PEFT, which is an extra: named here once, with the extra where it is missing."""

from __future__ import annotations

from secateur.core.errors import missing_extra

try:
    from peft.config import PeftConfig
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils.other import get_pattern_key
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "peft":
        raise
    raise missing_extra("peft", "peft", "train and load adapters") from error

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "check_adapters_to_merge",
    "get_pattern_key",
]
