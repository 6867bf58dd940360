"""GaLore's published example with Hugging Face, a Mistral trained by TRL's SFTTrainer, with one line changed.

    python examples/sft_mistral.py                   # half a minute on two CPU cores; downloads nothing

The original trains ``mistralai/Mistral-7B-v0.1`` on the data set ``imdb``. This one is shrunk: a Mistral of three
million parameters that reads bytes, on the Python standard library's files. What makes it GaLore is one line in each
(and an import); this one's honours what the original's ignores (betas, eps, weight decay), and resumes.
"""

from __future__ import annotations

import argparse
from itertools import islice

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import SFTTrainer  # type: ignore[attr-defined]

from galore_kernels.integrations.huggingface import trainer_optimizer
from galore_kernels.pretrain.documents import documents

CHARACTERS = 256


def corpus(count: int) -> Dataset:
    """The beginnings of so many files of the standard library; the original: ``load_dataset("imdb")``."""
    texts = (content.decode()[:CHARACTERS] for _, content in documents([]))
    return Dataset.from_dict({"text": list(islice(filter(str.strip, texts), count))})


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte; the original: ``AutoTokenizer.from_pretrained``."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def small_mistral(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """With random weights; the original: ``AutoModelForCausalLM.from_config``."""
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return MistralForCausalLM(config)


def main() -> None:
    """Trains, and logs the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--output-dir", default="runs/sft_mistral")
    options = parser.parse_args()

    tokenizer = tokenizer_of_bytes()
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=2,
        optim_target_modules=["attn", "mlp"],
        learning_rate=5e-3,
        logging_steps=10,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=small_mistral(tokenizer),
        args=args,
        train_dataset=corpus(2 * options.max_steps),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=trainer_optimizer(args),  # the original, in TrainingArguments: optim="galore_adamw",
    )
    trainer.train()


if __name__ == "__main__":
    main()
