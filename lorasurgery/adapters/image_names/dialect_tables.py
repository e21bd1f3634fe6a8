"""Image and video models have two sets of names: the original checkpoints' and diffusers'. Here is which is which.

A row is one original module and the diffusers modules whose rows it holds, one after the other. `{n}` and `{m}` stand
for numbers, `{rest}` for the rest of a path, `#` for a part of a module's rows. Facts: diffusers 0.42.1,
loaders/single_file_utils.py (convert_ldm_unet_checkpoint, convert_flux_transformer_checkpoint_to_diffusers and kin).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["even", "wide-last"]


@dataclass(frozen=True)
class Row:
    """One original module and its parts.

    Args:
        split: `even`, or `wide-last`: all parts but the last are as high as the module is wide (Flux's linear1).
        alias: The name is only ever met in adapters, never in a checkpoint.
    """

    original: str
    parts: tuple[str, ...]
    split: Split = "even"
    alias: bool = False


def _rows(table: str) -> tuple[Row, ...]:
    """Rows of `original = part`, or `original = stem.*part,part,part`, one a line."""
    found = []
    for line in table.strip().splitlines():
        original, right = (side.strip() for side in line.split("="))
        stem, _, parts = right.rpartition("*")
        found.append(Row(original, tuple(stem + part for part in parts.split(","))))
    return tuple(found)


_RESNET = (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
           ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"))  # fmt: skip
_UNET_ENDS = """
    input_blocks.0.0 = conv_in
    time_embed.0 = time_embedding.linear_1
    time_embed.2 = time_embedding.linear_2
    label_emb.0.0 = add_embedding.linear_1
    label_emb.0.2 = add_embedding.linear_2
    out.0 = conv_norm_out
    out.2 = conv_out
"""
_LEVELS = 6  # more than any SD has


def unet(layers: int = 2) -> tuple[Row, ...]:
    """SD 1, 2 and XL: diffusers numbers blocks by level, the original counts through.

    Args:
        layers: ResNets a level (layers_per_block), 2 in all of SD's.
    """
    found = list(_rows(_UNET_ENDS))
    step = layers + 1
    for b in range(_LEVELS):
        for j in range(layers):
            found += _block(f"input_blocks.{1 + b * step + j}", f"down_blocks.{b}", j)
        found.append(Row(f"input_blocks.{(b + 1) * step}.0.op", (f"down_blocks.{b}.downsamplers.0.conv",)))
        last = b * step + layers
        for place in (2, 1):  # after the attention, where the level has one; before the row that reads `1.` as one
            found.append(Row(f"output_blocks.{last}.{place}.conv", (f"up_blocks.{b}.upsamplers.0.conv",)))
        for j in range(step):
            found += _block(f"output_blocks.{b * step + j}", f"up_blocks.{b}", j)
    for place, part in ((0, "resnets.0"), (2, "resnets.1")):
        found += _resnet(f"middle_block.{place}", f"mid_block.{part}")
    found.append(Row("middle_block.1.{rest}", ("mid_block.attentions.0.{rest}",)))
    return tuple(found)


def _block(original: str, level: str, j: int) -> list[Row]:
    attention = Row(f"{original}.1.{{rest}}", (f"{level}.attentions.{j}.{{rest}}",))
    return [*_resnet(f"{original}.0", f"{level}.resnets.{j}"), attention]


def _resnet(original: str, ours: str) -> list[Row]:
    return [Row(f"{original}.{o}", (f"{ours}.{d}",)) for o, d in _RESNET]


_LINEAR1 = ("{n}.attn.to_q", "{n}.attn.to_k", "{n}.attn.to_v", "{n}.proj_mlp")
_LAST = Row("final_layer.adaLN_modulation.1", ("norm_out.linear#shift", "norm_out.linear#scale"))
_LINEAR1_ROW = Row("single_blocks.{n}.linear1", tuple(f"single_transformer_blocks.{p}" for p in _LINEAR1), "wide-last")

FLUX = (
    *_rows("""
    double_blocks.{n}.img_attn.qkv = transformer_blocks.{n}.attn.*to_q,to_k,to_v
    double_blocks.{n}.txt_attn.qkv = transformer_blocks.{n}.attn.*add_q_proj,add_k_proj,add_v_proj
    double_blocks.{n}.img_attn.proj = transformer_blocks.{n}.attn.to_out.0
    double_blocks.{n}.txt_attn.proj = transformer_blocks.{n}.attn.to_add_out
    double_blocks.{n}.img_attn.norm.query_norm = transformer_blocks.{n}.attn.norm_q
    double_blocks.{n}.img_attn.norm.key_norm = transformer_blocks.{n}.attn.norm_k
    double_blocks.{n}.txt_attn.norm.query_norm = transformer_blocks.{n}.attn.norm_added_q
    double_blocks.{n}.txt_attn.norm.key_norm = transformer_blocks.{n}.attn.norm_added_k
    double_blocks.{n}.img_mlp.0 = transformer_blocks.{n}.ff.net.0.proj
    double_blocks.{n}.img_mlp.2 = transformer_blocks.{n}.ff.net.2
    double_blocks.{n}.txt_mlp.0 = transformer_blocks.{n}.ff_context.net.0.proj
    double_blocks.{n}.txt_mlp.2 = transformer_blocks.{n}.ff_context.net.2
    double_blocks.{n}.img_mod.lin = transformer_blocks.{n}.norm1.linear
    double_blocks.{n}.txt_mod.lin = transformer_blocks.{n}.norm1_context.linear
    single_blocks.{n}.linear2 = single_transformer_blocks.{n}.proj_out
    single_blocks.{n}.modulation.lin = single_transformer_blocks.{n}.norm.linear
    single_blocks.{n}.norm.query_norm = single_transformer_blocks.{n}.attn.norm_q
    single_blocks.{n}.norm.key_norm = single_transformer_blocks.{n}.attn.norm_k
    img_in = x_embedder
    txt_in = context_embedder
    time_in.in_layer = time_text_embed.timestep_embedder.linear_1
    time_in.out_layer = time_text_embed.timestep_embedder.linear_2
    guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
    vector_in.in_layer = time_text_embed.text_embedder.linear_1
    vector_in.out_layer = time_text_embed.text_embedder.linear_2
    final_layer.linear = proj_out
    """),
    _LINEAR1_ROW,
    Row("single_blocks.{n}.qkv", tuple(f"single_transformer_blocks.{p}" for p in _LINEAR1[:3]), alias=True),  # XLabs
    _LAST,
)  # fmt: skip

_SD3 = (
    *_rows("""
    joint_blocks.{n}.x_block.attn.qkv = transformer_blocks.{n}.attn.*to_q,to_k,to_v
    joint_blocks.{n}.context_block.attn.qkv = transformer_blocks.{n}.attn.*add_q_proj,add_k_proj,add_v_proj
    joint_blocks.{n}.x_block.attn2.qkv = transformer_blocks.{n}.attn2.*to_q,to_k,to_v
    joint_blocks.{n}.x_block.attn.proj = transformer_blocks.{n}.attn.to_out.0
    joint_blocks.{n}.x_block.attn2.proj = transformer_blocks.{n}.attn2.to_out.0
    joint_blocks.{n}.context_block.attn.proj = transformer_blocks.{n}.attn.to_add_out
    joint_blocks.{n}.x_block.attn.ln_q = transformer_blocks.{n}.attn.norm_q
    joint_blocks.{n}.x_block.attn.ln_k = transformer_blocks.{n}.attn.norm_k
    joint_blocks.{n}.x_block.attn2.ln_q = transformer_blocks.{n}.attn2.norm_q
    joint_blocks.{n}.x_block.attn2.ln_k = transformer_blocks.{n}.attn2.norm_k
    joint_blocks.{n}.context_block.attn.ln_q = transformer_blocks.{n}.attn.norm_added_q
    joint_blocks.{n}.context_block.attn.ln_k = transformer_blocks.{n}.attn.norm_added_k
    joint_blocks.{n}.x_block.mlp.fc1 = transformer_blocks.{n}.ff.net.0.proj
    joint_blocks.{n}.x_block.mlp.fc2 = transformer_blocks.{n}.ff.net.2
    joint_blocks.{n}.context_block.mlp.fc1 = transformer_blocks.{n}.ff_context.net.0.proj
    joint_blocks.{n}.context_block.mlp.fc2 = transformer_blocks.{n}.ff_context.net.2
    joint_blocks.{n}.x_block.adaLN_modulation.1 = transformer_blocks.{n}.norm1.linear
    pos_embed = pos_embed.pos_embed
    x_embedder.proj = pos_embed.proj
    t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
    final_layer.linear = proj_out
    """),
    _LAST,
)  # fmt: skip


def sd3(blocks: int) -> tuple[Row, ...]:
    """SD3: the last block's context has only shift and scale, which diffusers stores the other way round.

    Args:
        blocks: How many there are; 0 when it is not known, then the context's modulation has no row.
    """
    names = [(f"joint_blocks.{n}.context_block.adaLN_modulation.1", f"transformer_blocks.{n}.norm1_context.linear")
             for n in range(blocks)]  # fmt: skip
    last = [Row(theirs, (f"{ours}#shift", f"{ours}#scale")) for theirs, ours in names[-1:]]
    return (*_SD3, *(Row(theirs, (ours,)) for theirs, ours in names[:-1]), *last)


WAN = _rows("""
    blocks.{n}.self_attn.q = blocks.{n}.attn1.to_q
    blocks.{n}.self_attn.k = blocks.{n}.attn1.to_k
    blocks.{n}.self_attn.v = blocks.{n}.attn1.to_v
    blocks.{n}.self_attn.o = blocks.{n}.attn1.to_out.0
    blocks.{n}.self_attn.norm_q = blocks.{n}.attn1.norm_q
    blocks.{n}.self_attn.norm_k = blocks.{n}.attn1.norm_k
    blocks.{n}.cross_attn.q = blocks.{n}.attn2.to_q
    blocks.{n}.cross_attn.k = blocks.{n}.attn2.to_k
    blocks.{n}.cross_attn.v = blocks.{n}.attn2.to_v
    blocks.{n}.cross_attn.o = blocks.{n}.attn2.to_out.0
    blocks.{n}.cross_attn.norm_q = blocks.{n}.attn2.norm_q
    blocks.{n}.cross_attn.norm_k = blocks.{n}.attn2.norm_k
    blocks.{n}.cross_attn.norm_k_img = blocks.{n}.attn2.norm_added_k
    blocks.{n}.cross_attn.k_img = blocks.{n}.attn2.add_k_proj
    blocks.{n}.cross_attn.v_img = blocks.{n}.attn2.add_v_proj
    blocks.{n}.ffn.0 = blocks.{n}.ffn.net.0.proj
    blocks.{n}.ffn.2 = blocks.{n}.ffn.net.2
    blocks.{n}.norm3 = blocks.{n}.norm2
    blocks.{n}.modulation = blocks.{n}.scale_shift_table
    text_embedding.0 = condition_embedder.text_embedder.linear_1
    text_embedding.2 = condition_embedder.text_embedder.linear_2
    time_embedding.0 = condition_embedder.time_embedder.linear_1
    time_embedding.2 = condition_embedder.time_embedder.linear_2
    time_projection.1 = condition_embedder.time_proj
    img_emb.proj.0 = condition_embedder.image_embedder.norm1
    img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
    img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
    img_emb.proj.4 = condition_embedder.image_embedder.norm2
    head.head = proj_out
    head.modulation = scale_shift_table
""")

_REFINER = """
    norm1 = norm1
    norm2 = norm2
    self_attn_qkv = attn.*to_q,to_k,to_v
    self_attn_proj = attn.to_out.0
    mlp.fc1 = ff.net.0.proj
    mlp.fc2 = ff.net.2
    adaLN_modulation.1 = norm_out.linear
"""
_HUNYUAN = (
    *_rows("""
    double_blocks.{n}.img_attn_qkv = transformer_blocks.{n}.attn.*to_q,to_k,to_v
    double_blocks.{n}.txt_attn_qkv = transformer_blocks.{n}.attn.*add_q_proj,add_k_proj,add_v_proj
    double_blocks.{n}.img_attn_proj = transformer_blocks.{n}.attn.to_out.0
    double_blocks.{n}.txt_attn_proj = transformer_blocks.{n}.attn.to_add_out
    double_blocks.{n}.img_attn_q_norm = transformer_blocks.{n}.attn.norm_q
    double_blocks.{n}.img_attn_k_norm = transformer_blocks.{n}.attn.norm_k
    double_blocks.{n}.txt_attn_q_norm = transformer_blocks.{n}.attn.norm_added_q
    double_blocks.{n}.txt_attn_k_norm = transformer_blocks.{n}.attn.norm_added_k
    double_blocks.{n}.img_mlp.fc1 = transformer_blocks.{n}.ff.net.0.proj
    double_blocks.{n}.img_mlp.fc2 = transformer_blocks.{n}.ff.net.2
    double_blocks.{n}.txt_mlp.fc1 = transformer_blocks.{n}.ff_context.net.0.proj
    double_blocks.{n}.txt_mlp.fc2 = transformer_blocks.{n}.ff_context.net.2
    double_blocks.{n}.img_mod.linear = transformer_blocks.{n}.norm1.linear
    double_blocks.{n}.txt_mod.linear = transformer_blocks.{n}.norm1_context.linear
    single_blocks.{n}.linear2 = single_transformer_blocks.{n}.proj_out
    single_blocks.{n}.q_norm = single_transformer_blocks.{n}.attn.norm_q
    single_blocks.{n}.k_norm = single_transformer_blocks.{n}.attn.norm_k
    single_blocks.{n}.modulation.linear = single_transformer_blocks.{n}.norm.linear
    img_in.proj = x_embedder.proj
    time_in.mlp.0 = time_text_embed.timestep_embedder.linear_1
    time_in.mlp.2 = time_text_embed.timestep_embedder.linear_2
    guidance_in.mlp.0 = time_text_embed.guidance_embedder.linear_1
    guidance_in.mlp.2 = time_text_embed.guidance_embedder.linear_2
    vector_in.in_layer = time_text_embed.text_embedder.linear_1
    vector_in.out_layer = time_text_embed.text_embedder.linear_2
    txt_in.input_embedder = context_embedder.proj_in
    txt_in.t_embedder.mlp.0 = context_embedder.time_text_embed.timestep_embedder.linear_1
    txt_in.t_embedder.mlp.2 = context_embedder.time_text_embed.timestep_embedder.linear_2
    txt_in.c_embedder.linear_1 = context_embedder.time_text_embed.text_embedder.linear_1
    txt_in.c_embedder.linear_2 = context_embedder.time_text_embed.text_embedder.linear_2
    final_layer.linear = proj_out
    """),
    *(Row(f"txt_in.individual_token_refiner.blocks.{{n}}.{row.original}",
          tuple(f"context_embedder.token_refiner.refiner_blocks.{{n}}.{part}" for part in row.parts))
      for row in _rows(_REFINER)),
    _LINEAR1_ROW,
    _LAST,
)  # fmt: skip
# ComfyUI's names of the same: comfy/supported_models.py, HunyuanVideo.process_unet_state_dict, October 2025.
_COMFY = (("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
          ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
          ("t_embedder.mlp.0", "t_embedder.in_layer"), ("t_embedder.mlp.2", "t_embedder.out_layer"),
          ("_in.mlp.0", "_in.in_layer"), ("_in.mlp.2", "_in.out_layer"), ("_mod.linear", "_mod.lin"),
          ("modulation.linear", "modulation.lin"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"),
          ("_attn_qkv", "_attn.qkv"), ("_attn_proj", "_attn.proj"), ("_attn_q_norm", "_attn.norm.query_norm"),
          ("_attn_k_norm", "_attn.norm.key_norm"), (".q_norm", ".norm.query_norm"),
          (".k_norm", ".norm.key_norm"))  # fmt: skip


def _comfy(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    found = []
    for row in rows:
        name = row.original
        for native, comfy in _COMFY:
            name = name.replace(native, comfy)
        if name != row.original:
            found.append(Row(name, row.parts, row.split, alias=True))
    return tuple(found)


HUNYUAN = (*_HUNYUAN, *_comfy(_HUNYUAN))

# OpenCLIP's text tower (SD 2, SDXL's second, SD3's clip_g), whose transformers names have lost their `text_model.`.
OPENCLIP = _rows("""
    transformer.resblocks.{n}.attn.in_proj = encoder.layers.{n}.self_attn.*q_proj,k_proj,v_proj
    transformer.resblocks.{n}.attn.out_proj = encoder.layers.{n}.self_attn.out_proj
    transformer.resblocks.{n}.mlp.c_fc = encoder.layers.{n}.mlp.fc1
    transformer.resblocks.{n}.mlp.c_proj = encoder.layers.{n}.mlp.fc2
    transformer.resblocks.{n}.ln_1 = encoder.layers.{n}.layer_norm1
    transformer.resblocks.{n}.ln_2 = encoder.layers.{n}.layer_norm2
    ln_final = final_layer_norm
    token_embedding = embeddings.token_embedding
""")  # fmt: skip
