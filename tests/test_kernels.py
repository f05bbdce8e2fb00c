"""The C kernel against the functions that state what it computes, and life without it."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from minillm import LLM, kernels
from minillm.kernels.quantized_matmul import KernelMatrix, for_kernel
from minillm.norm import rms_norm_fused, rms_norm_torch
from minillm.quantization import quantize_group_np, quantize_int8_np
from minillm.quantize_model import int4_matrix
from minillm.quantized_linear import W8A8, Int8
from minillm.rope import rope_fused, rope_torch

KINDS = ["int4-g32", "int4-g64", "int4-g128", "int4-g32-sym", "q8_0", "int8", "w8a8"]
needs_kernel = pytest.mark.skipif(kernels.load_kernel("quantized_matmul") is None,
                                  reason="no C compiler, or a CPU without AVX-512 VNNI")


def tensors(matrix):
    return matrix.converted(torch.from_numpy, torch.from_numpy, torch.float32)


def random_matrix(kind, R, K, rng):
    weight = rng.standard_normal((R, K)).astype(np.float32)
    if kind.startswith("int4"):
        group_size = int(kind.split("-g")[1].split("-")[0])
        return tensors(int4_matrix(*quantize_group_np(weight, group_size, kind.endswith("sym")),
                                   group_size))
    if kind == "q8_0":
        groups = weight.reshape(R, -1, 32)
        scale = (np.abs(groups).max(axis=2) / 127).astype(np.float16).astype(np.float32)
        return tensors(Int8(np.round(groups / scale[:, :, None]).astype(np.int8).reshape(R, K),
                            scale, 32))
    q, scale = quantize_int8_np(weight)
    return tensors({"int8": Int8, "w8a8": W8A8}[kind](q, scale, K))


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R, K", [(1, 64), (3, 32), (5, 192), (7, 160), (17, 576), (33, 1536)])
@pytest.mark.parametrize("N", [1, 2, 7, 13, 33, 64, 130])
def test_the_kernel_computes_what_the_reference_states(kind, R, K, N):
    rng = np.random.default_rng(R * K + N)
    matrix = random_matrix(kind, R, K, rng)
    fast = for_kernel(matrix)
    assert isinstance(fast, KernelMatrix)
    x = torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32))
    want = matrix.matmul_torch(x).double()
    scale = torch.linalg.vector_norm(x, dim=1).max() * matrix.dequantize_torch().abs().max()
    error = (fast.matmul_torch(x) - want).abs().max() / scale
    assert error < 5e-5, "activations are worth 15 bits, and no less"
    if kind == "w8a8":  # whole numbers, scaled in the same order
        assert torch.equal(fast.matmul_torch(x), matrix.matmul_torch(x))


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_same_alone_and_among_any_others(kind):
    """Tokens pass by in eights, in fours and one by one, 128 of them at a time."""
    rng = np.random.default_rng(8)
    fast = for_kernel(random_matrix(kind, 19, 192, rng))
    x = torch.from_numpy(rng.standard_normal((300, 192)).astype(np.float32))
    alone = torch.cat([fast.matmul_torch(each[None]) for each in x])
    for N in [*range(18), 33, 64, 127, 128, 129, 136, 256, 257, 300]:
        chosen = torch.from_numpy(rng.permutation(300)[:N])
        assert torch.equal(fast.matmul_torch(x[chosen]), alone[chosen])


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R", [1, 15, 16, 17, 40])
def test_every_weight_is_where_its_row_and_column_say(kind, R):
    matrix = random_matrix(kind, R, 128, np.random.default_rng(R))
    fast, weight = for_kernel(matrix), matrix.dequantize_torch()
    columns = fast.matmul_torch(torch.eye(128))  # 1 is worth 32512, and next to nothing is lost
    torch.testing.assert_close(columns, weight.T, rtol=1e-5, atol=1e-5)
    ids = torch.randint(R, (9,), generator=torch.Generator().manual_seed(R))
    assert torch.equal(fast.rows_torch(ids), weight[ids])


@needs_kernel
def test_a_product_by_hand():
    q = np.zeros((2, 32), np.int8)
    q[0, :2], q[1, 31] = [3, -2], -128
    matrix = tensors(Int8(q, np.float32([[0.5], [0.25]]), 32))
    x = torch.zeros(1, 32)
    x[0, [0, 1, 31]] = torch.tensor([254.0, 127.0, 2.0])  # times 128, the largest is 32512
    want = [0.5 * (3 * 254 - 2 * 127), 0.25 * (-128 * 2)]
    torch.testing.assert_close(for_kernel(matrix).matmul_torch(x), torch.tensor([want]))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_dtype_of_the_model(dtype):
    matrix = dataclasses.replace(random_matrix("q8_0", 33, 64, np.random.default_rng(9)),
                                 dtype=dtype)
    ids = torch.tensor([32, 0, 16])
    assert torch.equal(for_kernel(matrix).rows_torch(ids), matrix.rows_torch(ids))


@needs_kernel
def test_a_float64_loop_agrees():
    rng = np.random.default_rng(0)
    matrix = random_matrix("int4-g32", 5, 192, rng)
    x = rng.standard_normal((2, 192)).astype(np.float32)
    got = for_kernel(matrix).matmul_torch(torch.from_numpy(x))
    weight = matrix.dequantize_torch().double()
    for n in range(2):
        for r in range(5):
            want = sum(float(x[n, k]) * float(weight[r, k]) for k in range(192))
            assert abs(got[n, r].item() - want) < 2e-3


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_layout_of_the_activations(dtype):
    matrix = random_matrix("int4-g32", 16, 64, np.random.default_rng(1))
    fast = for_kernel(matrix)
    x = torch.randn(64, 3).to(dtype).T  # not contiguous
    y = fast.matmul_torch(x)
    assert y.dtype == dtype and y.shape == (3, 16)
    assert torch.allclose(y.float(), matrix.matmul_torch(x.float()), rtol=0.02, atol=0.1)


@needs_kernel
def test_zeros_large_and_small_numbers():
    torch.manual_seed(2)
    matrix = random_matrix("int8", 8, 64, np.random.default_rng(2))
    fast = for_kernel(matrix)
    assert torch.equal(fast.matmul_torch(torch.zeros(1, 64)), torch.zeros(1, 8))
    for factor in (1e-20, 1e20):
        x = factor * torch.randn(1, 64)
        assert torch.allclose(fast.matmul_torch(x), matrix.matmul_torch(x), rtol=1e-3,
                              atol=2e-3 * factor)


@needs_kernel
@pytest.mark.parametrize("kind", ["int4-g32", "q8_0", "int8", "w8a8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_visible(kind, bad):
    fast = for_kernel(random_matrix(kind, 4, 128, np.random.default_rng(5)))
    x = torch.ones(14, 128)  # eight tokens together, four, and two
    for n in (1, 9, 13):
        x[n, 70] = bad
    are_finite = torch.ones(14, 4, dtype=torch.bool)
    are_finite[[1, 9, 13]] = False
    assert torch.equal(fast.matmul_torch(x).isfinite(), are_finite)


@needs_kernel
def test_a_wrong_width_is_refused():
    fast = for_kernel(random_matrix("int4-g32", 4, 128, np.random.default_rng(6)))
    for K in (64, 192):
        with pytest.raises(ValueError, match=f"{K} columns, must have the 128"):
            fast.matmul_torch(torch.ones(1, K))


@needs_kernel
def test_torchs_defaults_do_not_matter():
    fast = for_kernel(random_matrix("int4-g32", 4, 128, np.random.default_rng(7)))
    x = torch.randn(1, 128)
    want, many = fast.matmul_torch(x), fast.matmul_torch(x.repeat(20, 1))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast.matmul_torch(x), want)
        assert torch.equal(fast.matmul_torch(x.repeat(20, 1)), many)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernel
def test_a_minimum_beyond_float16_is_left_to_others():
    weight = np.full((2, 64), 3e5, np.float32)
    assert for_kernel(tensors(int4_matrix(*quantize_group_np(weight, 32, True), 32))) is None


def test_norm_and_rotation_of_other_shapes_are_left_to_pytorch():
    with pytest.raises(RuntimeError):
        rms_norm_fused(torch.ones(1, 8), torch.ones(3), 1e-5)
    assert torch.equal(rms_norm_fused(torch.ones(1, 8), torch.ones(1), 0.0), torch.ones(1, 8))
    x, cos, sin = torch.randn(2, 3, 4), torch.randn(1, 2), torch.randn(1, 2)
    assert torch.equal(rope_fused(x, cos, sin), rope_torch(x, cos, sin))


@needs_kernel
@pytest.mark.parametrize("kind, K", [("int4-g32", 80), ("int4-g48", 96), ("int8", 48),
                                     ("w8a8", 16)])
def test_other_widths_are_left_to_others(kind, K):
    assert for_kernel(random_matrix(kind, 8, K, np.random.default_rng(3))) is None


@needs_kernel
def test_other_groups_are_left_to_others():
    q, scale = torch.ones(8, 128, dtype=torch.int8), torch.ones(8, 2)
    assert for_kernel(Int8(q, scale, 64)) is None


@needs_kernel
def test_a_bias_is_kept():
    matrix = random_matrix("int8", 8, 64, np.random.default_rng(4))
    matrix = dataclasses.replace(matrix, bias=torch.ones(8))
    assert torch.equal(for_kernel(matrix).bias, torch.ones(8))


@needs_kernel
def test_the_engine_multiplies_through_the_kernel(model_path):
    weights = LLM(str(model_path), device="cpu", quantize="native").runner.weights
    matrices = [weights.lm_head] + [getattr(layer, name) for layer in weights.layers for name in (
        "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    assert all(isinstance(matrix, KernelMatrix) for matrix in matrices)
    assert weights.lm_head is weights.embed_tokens, "a tied head is held once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 576), (3, 100), (16, 1), (40, 576), (2, 3, 50)])
def test_norm_in_one_call(shape, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    torch.testing.assert_close(rms_norm_fused(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5),
                               rtol=1e-5, atol=1e-5)
    by_head = torch.randn(shape, dtype=dtype)  # a norm weight for every head, as in Qwen3
    assert torch.equal(rms_norm_fused(x, by_head, 1e-5), rms_norm_torch(x, by_head, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, H, D", [(1, 12, 64), (5, 3, 16), (100, 12, 64)])
def test_rotation_in_one_call(N, H, D, dtype):
    torch.manual_seed(1)
    qkv, angles = torch.randn(N, H + 4, D, dtype=dtype), torch.randn(N, D // 2)
    cos, sin = torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)
    for x in (qkv[:, :H], qkv[:, 1 : H + 1], qkv[:, :H].transpose(1, 2).contiguous().mT):
        torch.testing.assert_close(rope_fused(x, cos, sin), rope_torch(x, cos, sin))


def test_gradients_flow_around_the_kernel():
    x, weight = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    rms_norm_fused(x, weight, 1e-5).sum().backward()
    assert weight.grad.abs().min() > 0
    x = torch.randn(2, 3, 4, requires_grad=True)
    rope_fused(x, torch.ones(2, 2), torch.zeros(2, 2)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("environment", [{"CC": "gcc '"}, {"CC": "/"},
                                         {"XDG_CACHE_HOME": "/dev/null"}])
def test_no_kernel_is_no_error(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kernels, "cpu_flags", lambda: "flags: some other machine's avx512_vnni")
    with pytest.warns(UserWarning, match="a C compiler with OpenMP"):
        assert kernels.load_kernel.__wrapped__("decode_ops") is None


def test_without_a_compiler_pytorchs_operators_answer(model_path, tmp_path):
    """In a process of its own: what was compiled before is remembered."""
    program = (
        "import json, sys\n"
        "from minillm import LLM, SamplingParams\n"
        "from minillm.kernels import load_kernel\n"
        "llm = LLM(sys.argv[1], quantize='native', device='cpu')\n"
        "output = llm.generate(['The capital of France is'],\n"
        "                      SamplingParams(temperature=0, max_tokens=1))[0]\n"
        "print(json.dumps([load_kernel('quantized_matmul') is None, llm.runner.dtype,"
        " output.text]))\n")
    environment = {**os.environ, "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program, str(model_path)], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, "bfloat16", " Paris"]


def test_a_kernel_that_does_not_compile_leaves_nothing_behind(tmp_path, monkeypatch):
    source = tmp_path / "broken.c"
    source.write_text("this is no C")
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        kernels.compile_kernel(["cc", *kernels.FLAGS], source, tmp_path / "cache" / "broken.so")
    assert list((tmp_path / "cache").iterdir()) == []
