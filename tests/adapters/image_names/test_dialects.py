"""Two sets of names for one model, held against diffusers' own checkpoint converters and against real models' names."""

from __future__ import annotations

import images
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs

from lorasurgery.adapters.image_names.components import adapter_place
from lorasurgery.adapters.image_names.dialects import dialect, family_of
from lorasurgery.adapters.image_names.dictionary import Dictionary, split_leaf
from lorasurgery.checkpoint.header import TensorInfo

Shapes = dict[str, tuple[int, ...]]
SDXL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux", "sd3", "wan", "hunyuan"])
def test_every_tensor_has_the_name_and_rows_that_diffusers_gives_it(kind: str) -> None:
    """What our tables name as the original does is turned by diffusers' converter into the model, tensor by tensor."""
    model = images.denoiser(kind)
    weights = images.original(model)
    back = images.diffusers_names(kind, weights)
    state = model.state_dict()
    assert back.keys() == state.keys()
    assert [k for k, v in state.items() if not torch.equal(v, back[k])] == []


def test_openclip_has_the_names_and_rows_that_diffusers_gives_it() -> None:
    """The same of OpenCLIP's text tower, whose q, k and v are one tensor and whose projection is turned."""
    model, prefix = images.text_encoder(True), "conditioner.embedders.1.model."
    weights = {prefix + k: v for k, v in images.openclip(model).items()}
    back = theirs.convert_open_clip_checkpoint(model, weights, prefix)
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}
    state["text_projection.weight"] = state.pop("text_model.text_projection.weight")
    state.pop("text_model.embeddings.position_ids", None)
    back = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in back.items()}
    assert state.keys() <= back.keys()
    assert [k for k, v in state.items() if not torch.equal(v, back[k])] == []


def real(kind: str) -> torch.nn.Module:
    """A model of its true size without memory."""
    with torch.device("meta"):
        if kind == "flux":
            return FluxTransformer2DModel(guidance_embeds=True)
        return UNet2DConditionModel(**(SDXL if kind == "sdxl" else SD1))


def shapes_of(model: torch.nn.Module) -> tuple[Shapes, Shapes]:
    """A model's modules with the shapes of their weights, by diffusers' names and by the original's."""
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return ours, {k: tuple(v.shape) for k, v in images.original(model).items()}


def dictionary(shapes: Shapes) -> Dictionary:
    """What a base of these tensors knows."""
    return Dictionary({k: TensorInfo(k, "F32", s, 0, 0) for k, s in shapes.items()}, pipeline=False)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_underscores_lead_back_to_one_module_each_in_models_of_true_size(kind: str) -> None:
    """No two modules of SD 1, SDXL or Flux share an underscored name; each finds its own tensor, in either base."""
    for shapes in shapes_of(real(kind)):
        base = dictionary(shapes)
        modules = [split_leaf(k)[0] for k, s in shapes.items() if len(s) > 1]
        assert len({m.replace(".", "_") for m in modules}) == len(modules)
        for module in modules:
            place = adapter_place(f"lora_unet_{module.replace('.', '_')}")
            assert place is not None
            assert base.path_of(place) is not None
            assert [(s.tensor, s.rows, s.into) for s in base.find(place)] == [(f"{module}.weight", None, None)]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_each_set_of_names_finds_all_rows_of_the_other_in_models_of_true_size(kind: str) -> None:
    """Every module by its other name finds tensors of the base that together have its rows, none of them twice."""
    ours, original = shapes_of(real(kind))
    for wanted, shapes in ((ours, original), (original, ours)):
        base, seen = dictionary(shapes), set()
        for key, shape in wanted.items():
            if len(shape) < 2:
                continue
            place = adapter_place(f"lora_unet_{split_leaf(key)[0].replace('.', '_')}")
            assert place is not None
            rows = 0
            for slot in base.find(place):
                span = slot.into or slice(0, shapes[slot.tensor][0])
                assert shapes[slot.tensor][1:] == shape[1:]
                assert (slot.tensor, span.start) not in seen
                seen.add((slot.tensor, span.start))
                rows += span.stop - span.start
            assert rows == shape[0], key


def in_transformers(model: torch.nn.Module) -> int:
    """Linear layers and 1×1 convolutions inside Transformer2DModel, what sd-scripts adapts by default."""
    inside = [m for _, m in model.named_modules() if type(m).__name__ == "Transformer2DModel"]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return sum(isinstance(layer, kinds) for m in inside for layer in m.modules())


def test_the_counts_that_trainers_log() -> None:
    """sd-scripts adapts 192 U-Net modules of SD 1, 722 of SDXL, and 304 of Flux (sd-scripts #2236 has its log)."""
    assert in_transformers(real("sd1")) == 192
    assert in_transformers(real("sdxl")) == 722
    _, original = shapes_of(real("flux"))
    blocks = [k for k, s in original.items() if len(s) == 2 and k.startswith(("double_blocks", "single_blocks"))]
    assert len(blocks) == len({split_leaf(k)[0].replace(".", "_") for k in blocks}) == 304


KNOWN = [
    ("sdxl", "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
     "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("sdxl", "middle_block.1.transformer_blocks.9.ff.net.2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
    ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ("sdxl", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("sdxl", "label_emb.0.2", "add_embedding.linear_2"),
    ("sd1", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    ("sd1", "output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    ("sd1", "input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
    ("flux", "double_blocks.18.txt_mlp.2", "transformer_blocks.18.ff_context.net.2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "original", "ours"), KNOWN)
def test_names_that_everybody_knows(kind: str, original: str, ours: str) -> None:
    """A few well-known pairs, written out, of models of true size."""
    names, known = shapes_of(real(kind))
    assert f"{ours}.weight" in names
    assert f"{original}.weight" in known
    assert dialect(family_of(split_leaf(k)[0] for k in known)).spell(original).atoms == (ours,)


def test_the_family_is_told_alike_by_either_set_of_names() -> None:
    """A model's two sets of names are of one family, so that an adapter of one finds its base of the other."""
    for kind in ("sd1", "sdxl", "flux", "sd3", "wan", "hunyuan"):
        model = images.denoiser(kind)
        named = [
            family_of({split_leaf(k)[0] for k in weights}) for weights in (model.state_dict(), images.original(model))
        ]
        assert named[0] == named[1] == ("unet" if kind.startswith("sd") and kind != "sd3" else kind)


@pytest.mark.parametrize(
    ("said", "layers"),
    [(1, 1), (2, 2), (8, 8), (9, None), (0, None), (-1, None), (2.0, None), ("2", None), (None, None)],
)
def test_resnets_a_level_are_what_the_config_says(said: object, layers: int | None) -> None:
    """layers_per_block numbers a U-Net's blocks; what no U-Net has, as a stranger's file may say, counts as not told."""
    name = "unet.down_blocks.0.resnets.0.conv1.weight"
    tensors = {name: TensorInfo(name, "F32", (4, 4, 3, 3), 0, 576)}
    found = Dictionary(tensors, pipeline=True, config=lambda _: {"layers_per_block": said})
    assert found.sides["denoiser"].names is dialect("unet", layers)
