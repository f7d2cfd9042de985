"""Diffusion with adapters, through diffusers: load, weigh, mix, fuse, unfuse and swap LoRAs of a UNet and a text encoder.

python examples/diffusers_lora.py    a tiny random Stable Diffusion pipeline made here: no network is needed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

UNET_TARGETS, TEXT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "v_proj"]


def make_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A pipeline with random weights, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=0,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_lora(folder: Path, seed: int, rank: int) -> None:
    """A LoRA for UNet and text encoder, in the format that diffusion models are shared in; random in place of trained."""
    pipeline = make_pipeline(folder / "tokenizer")
    torch.manual_seed(seed)
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=UNET_TARGETS))
    pipeline.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT_TARGETS))
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )


def swapped(out: Path) -> torch.Tensor:
    """The image of a compiled UNet whose LoRA was replaced while in use, without compiling it again."""
    pipeline = make_pipeline(out / "tokenizer")
    unet = pipeline.unet
    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": "unet", "adapter_name": "style"}
    unet.enable_lora_hotswap(target_rank=4)  # the largest rank to come
    unet.load_lora_adapter(out / "ink", **file)
    pipeline.unet = torch.compile(unet, backend="eager")
    paint(pipeline)
    with torch.compiler.set_stance("fail_on_recompile"):
        unet.load_lora_adapter(out / "oil", hotswap=True, **file)
        return paint(pipeline)


def paint(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """An image for a fixed prompt and noise, (3, height, width)."""
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(
        pipeline("a fox", num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np").images[0]
    ).permute(2, 0, 1)


def main(arguments: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Use two LoRAs in every way that diffusers offers.

    Returns:
        The image of each stage.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/diffusers"), help="folder for the LoRA files")
    args = parser.parse_args(arguments)
    write_lora(args.out / "ink", seed=1, rank=4)
    write_lora(args.out / "oil", seed=2, rank=2)

    pipeline = make_pipeline(args.out / "tokenizer")
    images = {"plain": paint(pipeline)}
    pipeline.load_lora_weights(args.out / "ink", adapter_name="ink")
    images["ink"] = paint(pipeline)
    pipeline.load_lora_weights(args.out / "oil", adapter_name="oil")
    pipeline.set_adapters("oil")
    images["oil"] = paint(pipeline)
    pipeline.set_adapters(["ink", "oil"], adapter_weights=[0.7, 0.4])
    images["mixed"] = paint(pipeline)
    pipeline.fuse_lora(adapter_names=["ink", "oil"], lora_scale=1.0)
    images["fused"] = paint(pipeline)
    pipeline.unfuse_lora()
    images["unfused"] = paint(pipeline)
    pipeline.delete_adapters("oil")
    pipeline.set_adapters("ink")
    images["ink again"] = paint(pipeline)
    pipeline.disable_lora()
    images["disabled"] = paint(pipeline)
    pipeline.unload_lora_weights()
    images["unloaded"] = paint(pipeline)
    pipeline.unet.load_lora_adapter(
        args.out / "oil", weight_name="pytorch_lora_weights.safetensors", prefix="unet", adapter_name="oil"
    )
    images["oil, UNet only"] = paint(pipeline)
    images["swapped in"] = swapped(args.out)
    for name, image in images.items():
        print(f"{name:>14}: differs from the plain image by {(image - images['plain']).abs().max():.4f}")
    return images


if __name__ == "__main__":
    main()
