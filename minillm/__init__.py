"""minillm: how LLM inference works, as an engine that can be read in a weekend."""

from .errors import InputError
from .llm import LLM
from .request import RequestOutput
from .sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "InputError", "RequestOutput", "SamplingParams", "__version__"]
