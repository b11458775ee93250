"""Asks a vLLM server for a text in the way of a person: python client.py "Write a note." --user ann

This file stands beside what `plrhf export to=vllm` wrote, and needs openai, torch and transformers alone.
The person's vectors and the embeddings of the prompt are sent together as prompt embeddings.
"""

import argparse
import base64
import io
import json
from pathlib import Path

import openai
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer


class Export:
    """The tokenizer, token embeddings and people of an export."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.people = json.loads((folder / "people.json").read_text())
        tensors = load_file(folder / "embeddings.safetensors")
        self.tokens, self.vectors = tensors["tokens"], tensors["people"]  # [V, e], [1 + n, T, e]

    def token_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt as the policy was trained to read it."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(prompt + self.people["separator"])["input_ids"])
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_embeds(self, prompt: str, user: str | None) -> torch.Tensor:
        """Return a person's vectors and the embeddings of a prompt, [L, e]; user None: the generic one."""
        known = [None, *self.people["users"]]
        if user not in known:
            raise SystemExit(f"{user!r} is not among the people of people.json")
        vectors, text = self.vectors[known.index(user)], self.tokens[self.token_ids(prompt)]
        return torch.cat([text, vectors] if self.people["after_prompt"] else [vectors, text])


def encoded(tensor: torch.Tensor) -> str:
    """Return a tensor as vLLM reads it from a request: saved by torch, in base64."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--user")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="policy")
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args()
    embeds = Export(Path(__file__).parent).prompt_embeds(given.prompt, given.user)
    client = openai.OpenAI(base_url=given.url, api_key="none")
    answer = client.completions.create(
        model=given.model,
        prompt="",
        max_tokens=given.max_tokens,
        extra_body={"prompt_embeds": encoded(embeds)},
    )
    print(answer.choices[0].text)


if __name__ == "__main__":
    main()
