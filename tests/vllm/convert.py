"""Turn a GGUF file into what vLLM loads: bfloat16 weights, a tokenizer, a chat template.

Run by prepare.py with the vLLM environment's Python: `python -I convert.py MODEL.gguf OUTPUT_DIRECTORY`. Forebay's own
environment has neither torch nor transformers, hence the untyped imports.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1"
)
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
gguf: Any = importlib.import_module("gguf")
splitters: Any = importlib.import_module("tokenizers.pre_tokenizers")


def metadata(reader: Any, key: str) -> Any:
    """Return one value of the GGUF file's header, None where there is none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def convert_weights(source: Path, target: Path, eos_token_id: int) -> None:
    """Write the dequantised weights; transformers will not save a model it has loaded from a GGUF file."""
    load = transformers.AutoModelForCausalLM
    loaded = load.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = load.from_config(config, dtype=torch.bfloat16)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    result = fresh.load_state_dict(weights, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise SystemExit(f"weights do not fit the configuration: {result}")
    fresh.tie_weights()
    fresh.generation_config.eos_token_id = eos_token_id
    fresh.save_pretrained(target)


def convert_tokenizer(source: Path, target: Path) -> int:
    """Write the tokenizer with its chat template; return the id that ends a turn."""
    reader = gguf.GGUFReader(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = tokenizer.chat_template or metadata(reader, "tokenizer.chat_template")
    if not tokenizer.chat_template:
        raise SystemExit(f"{source.name} has no chat template")
    eos_token_id = int(metadata(reader, "tokenizer.ggml.eos_token_id"))
    if tokenizer.eos_token_id != eos_token_id:
        raise SystemExit(f"end of turn is {tokenizer.eos_token_id} in the tokenizer, {eos_token_id} in the file")
    if metadata(reader, "tokenizer.ggml.pre") == "smollm":  # transformers forgets that this one takes digits one by one
        digits, rest = splitters.Digits(individual_digits=True), splitters.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = splitters.Sequence([digits, rest])
    tokenizer.save_pretrained(target)
    return eos_token_id


def main() -> None:
    """Convert the file named on the command line."""
    source, target = (Path(argument).resolve() for argument in sys.argv[1:3])
    target.mkdir(parents=True)
    convert_weights(source, target, convert_tokenizer(source, target))


if __name__ == "__main__":
    main()
