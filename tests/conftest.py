"""What every test may ask for: the real model's file, and the real model, loaded once."""

import os

# Tests use small tensors: two threads would wait for each other longer than they compute. NumPy
# and torch read this when they are imported, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from minillm import LLM
from minillm.loading.registry import resolve


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA GPU"))


@pytest.fixture(scope="session")
def model_path():
    """The GGUF file of the default model, fetched if it is not there."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def llm_numpy(model_path):
    return LLM(str(model_path), backend="numpy")


@pytest.fixture(scope="session")
def llm_torch(model_path):
    return LLM(str(model_path), backend="torch", device="cpu", dtype="float32")
