"""LoRA adapters as task vectors: read, applied, merged with each other, extracted from fine-tunes, written for PEFT."""

from jaxmerge.converters.lora.adapter import LoraAdapter, apply_lora, task_vectors
from jaxmerge.converters.lora.extraction import Extraction, extract_lora
from jaxmerge.converters.lora.factors import LowRank, factorise, inner, low_rank_sum, truncate
from jaxmerge.converters.lora.merging import add_loras, merge_loras
from jaxmerge.converters.lora.peft_folder import check_adapter_folder, load_lora, save_lora
from jaxmerge.converters.lora.randomised_svd import randomised_svd

__all__ = [
    "Extraction",
    "LoraAdapter",
    "LowRank",
    "add_loras",
    "apply_lora",
    "check_adapter_folder",
    "extract_lora",
    "factorise",
    "inner",
    "load_lora",
    "low_rank_sum",
    "merge_loras",
    "randomised_svd",
    "save_lora",
    "task_vectors",
    "truncate",
]
