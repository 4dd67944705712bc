"""The bridge to PEFT: registration, names, and what is said where PEFT is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from secateur.methods.adapters.spp import SppConfig, SppModel
from secateur.train.adapter_config import AdapterConfig, method_name, register
from secateur.train.adapter_model import AdapterModel


def test_registering_twice_is_harmless_and_a_taken_name_is_refused():
    register(SppConfig, SppModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["secateur_spp"] is SppConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["secateur_spp"] is SppModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["secateur_spp"] == "secateur_spp_"

    class Other(AdapterConfig):
        method = "spp"

    with pytest.raises(ValueError, match="PEFT knows another method called `secateur_spp`"):
        register(Other, SppModel)

    class Astray(AdapterModel):
        prefix = "spp_"

    with pytest.raises(ValueError, match="the prefix of `Astray` must be `secateur_spp_`"):
        register(SppConfig, Astray)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["secateur_spp"] is SppConfig


def test_names_answer_as_pefts_enum_does():
    name = method_name(SppConfig)
    assert name == name.value == "secateur_spp"
    assert {name: 1}["secateur_spp"] == 1


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_without_peft_the_error_names_the_extra_and_the_rest_works():
    done = run("""
import sys; sys.modules["peft"] = None
import secateur
assert "torch" not in sys.modules
secateur.NM(2, 4)
try:
    from secateur import SppConfig
except secateur.core.errors.InputError as error:
    assert "`peft` is needed to train and load adapters" in str(error), error
    assert error.hint == "pip install 'secateur[peft]'", error.hint
else:
    raise SystemExit("no error")
""")
    assert done.returncode == 0, done.stderr


def test_naming_one_configuration_lets_peft_load_all():
    done = run("""
from secateur import SppConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
assert {"secateur_spp", "secateur_masked", "secateur_pst"} <= set(known)
""")
    assert done.returncode == 0, done.stderr
