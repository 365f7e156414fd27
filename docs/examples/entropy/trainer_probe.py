"""A policy gradient in transformers' own Trainer, watched by EntropyProbe: each step predicted, then measured.

Run it as ``python trainer_probe.py [FOLDER]``. The model is tiny and random, its reward the number of its most frequent
token; put your own model, or TRL's GRPOTrainer, in the place of both. Needs: pip install "lightning-toys[language]".
"""

import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from lightning_toys.update_entropy.hf import EntropyProbe, PromptSampler

PROMPTS = [[3], [4, 5], [6, 4], [7, 7, 3]]  # token ids; texts and chats want a tokenizer
END, LENGTH, GROUP = 2, 8, 8


class PolicyGradient(Trainer):
    """REINFORCE with the mean of the group as baseline."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sample a group of responses to each prompt of the batch, and return the loss of them."""
        prompts = [PROMPTS[int(i)] for i in inputs["which"] for _ in range(GROUP)]
        sample = PromptSampler(prompts, LENGTH, ends=[END], seed=1 + self.state.global_step)
        responses = sample(model, 0, "train", len(prompts))
        loss = torch.zeros(())
        for prompt, response in zip(responses.prompts, responses.responses, strict=True):
            group = [r for p, r in zip(responses.prompts, responses.responses, strict=True) if p == prompt]
            rewards = [float(r.count(8)) for r in group]
            advantage = float(response.count(8)) - sum(rewards) / len(rewards)
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1))
            loss = loss - advantage * logp.sum() / len(prompts)
        return loss


def main(folder: str = "trainer_probe", **settings) -> Trainer:
    """Train for a few steps, and return the Trainer.

    Args:
        folder: where checkpoints would go.
        settings: of TrainingArguments.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, eos_token_id=END, pad_token_id=0,
            bos_token_id=1,
        )
    )  # fmt: skip
    arguments = {
        "output_dir": folder, "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 3e-3,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "logging_steps": 2, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = PolicyGradient(
        model,
        TrainingArguments(**(arguments | settings)),
        train_dataset=[{"which": i % len(PROMPTS)} for i in range(24)],
    )
    sampler = PromptSampler(PROMPTS, LENGTH, ends=[END])
    EntropyProbe(sampler, every_n_steps=2, prompts=128, measure_prompts=256).attach(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    for row in main(*sys.argv[1:2]).state.log_history:
        if "entropy_step/predicted" in row:
            found = {n.removeprefix("entropy_step/"): x for n, x in row.items()}
            print(
                f"step {row['step']}: predicted {found['second_order']:.4f} ± {found['second_order_se']:.4f}, "
                f"measured {found['measured']:.4f} ± {found['measured_se']:.4f} nats a token (momentum "
                f"{found['momentum']:.4f}, decay {found['decay']:.5f}, batch {found['batch']:.4f})"
            )
