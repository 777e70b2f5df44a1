"""NVRTC takes every kernel, for three architectures: two registers spill at most, and products and sums stay apart."""

import re
import sys
from pathlib import Path

import pytest
import torch

import optimisers as opt
from optimisers.arrays import Untraceable
from optimisers.engine.kernels.cuda import nvrtc
from optimisers.engine.kernels.cuda.combine import combining

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import texts

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TEXTS = texts(torch.float32, torch.bfloat16, torch.float64)


def test_there_are_programs_of_every_kind():
    assert len(TEXTS) > 150
    assert {"Adam-float32", "ClipNorm > AdamW-bfloat16", "NormGrowthCap-float64", "combining-3.0"} <= {x for x, _ in TEXTS}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("label", "text"), TEXTS, ids=[label for label, _ in TEXTS])
def test_kernels_compile_and_do_not_spill(label, text, architecture):
    if label.endswith("float64") and architecture != "sm_90":
        pytest.skip("float64 is compiled for one architecture, to save a minute")
    made = nvrtc.compiled(text, architecture, "--ptxas-options=-v")
    assert made.image[:4] == b"\x7fELF"
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill", made.log)]
    assert spills
    # Where there are eleven arrays, ptxas puts one or two registers of 65 aside, to have more threads at once.
    assert max(spills) <= 8, made.log


@pytest.mark.parametrize(("label", "text"), TEXTS, ids=[label for label, _ in TEXTS])
def test_arithmetic_is_what_was_written(label, text):
    ptx = nvrtc.compiled(text, "compute_90").image.decode()
    if not re.search(r"\b(exp|log|tanh|pow)f?\(", text):  # these are made of fused operations inside
        assert not re.search(r"\bfma\.", ptx)
    assert "div.approx" not in ptx
    assert "sqrt.approx" not in ptx
    if "pass_" in text:
        loads = re.findall(r"ld\.global\.(?:nc\.)?(v\d\.[a-z]\d+)", ptx)
        assert {"v4.b32", "v4.f32", "v2.b64", "v2.f64", "v4.u32", "v8.u16", "v2.u64"} & set(loads), set(loads)


def test_what_does_not_compile_is_told():
    with pytest.raises(nvrtc.CompilationFailed, match="NVRTC fails for sm_90: "):
        nvrtc.compiled("this is no C", "sm_90")
    with pytest.raises(nvrtc.CompilationFailed, match="sm_9"):
        nvrtc.compiled(TEXTS[0][1], "sm_9")


def test_a_rule_that_reads_its_measures_has_no_kernel():
    with pytest.raises(Untraceable):
        combining(opt.SkipNonFinite(), [0], 1, [0])
