"""The table of defaults: which modules of each transformers model type a method adapts when the user names none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Targets = tuple[str, ...] | str
"""Names or ends of names of modules, or one regular expression for the whole name (``re.fullmatch``)."""


@dataclass(frozen=True)
class Defaults:
    """Modules of one model type by the role they play.

    Attributes:
        attention: What low-rank and similar methods adapt: queries and values, or the fused projection that holds them.
        key_value_feedforward: What methods that rescale activations adapt: keys, values and the layer that ends the
            feed-forward network. ``None``: no default.
        feedforward: Those of ``key_value_feedforward`` in the feed-forward network: their *input* is rescaled.
            Empty where that network has no layer that could be adapted, as with experts stacked into one parameter.
    """

    attention: Targets
    key_value_feedforward: Targets | None = None
    feedforward: Targets | None = None


ROLES = ("attention", "key_value_feedforward", "feedforward")
"""The columns of the table."""

# Most families follow one of a few naming schemes. Values that configurations in the field already rely on are kept
# exactly as they are known there, oddities included: a configuration without targets means the same layers here.

_LLAMA = Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "down_proj"), ("down_proj",))
_GEMMA = Defaults(("q_proj", "v_proj"), ("q_proj", "v_proj", "down_proj"), ("down_proj",))
_STACKED_EXPERTS = Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj"), ())
_FUSED_QKV = Defaults(("query_key_value",), ("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",))
_GPT2 = Defaults(("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",))
_BERT = Defaults(("query", "value"), ("key", "value", "output.dense"), ("output.dense",))
_DEBERTA_V2 = Defaults(("query_proj", "value_proj"), ("key_proj", "value_proj", "output.dense"), ("output.dense",))
_T5 = Defaults(("q", "v"), ("k", "v", "wo"), ("wo",))
_BART = Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "fc2"), ("fc2",))
_XLM = Defaults(("q_lin", "v_lin"), ("k_lin", "v_lin", "lin2"), ("lin2",))
_WAV2VEC2 = Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "output_dense"), ("output_dense",))
_CONFORMER = Defaults(("linear_q", "linear_v"), ("linear_k", "linear_v", "output_dense"), ("output_dense",))

# Latent attention: the query is one projection or two in a row, keys and values come from one latent.
_LATENT = Defaults(r".*\.(q_proj|q_b_proj|kv_b_proj)", ("kv_b_proj", "down_proj"), ("down_proj",))

# Linear attention in most layers, softmax attention in some.
_GATED_DELTA = Defaults(
    r".*\.(q_proj|v_proj|in_proj_qkvz?)", r".*\.(k_proj|v_proj|in_proj_qkvz?|down_proj)", r".*\.down_proj"
)

# Only this projection is called as a layer: fused scan kernels read the weights of the others past any adapter.
_MAMBA = Defaults(("in_proj",))

# transformers 5 renamed the layers of vision transformers (query -> q_proj, output.dense -> mlp.fc2): both are meant.
_VIT = Defaults(
    r".*\.(query|value|q_proj|v_proj)",
    r".*\.(key|value|k_proj|v_proj|\d+\.output\.dense|mlp\.(fc2|dense2|down_proj|weights_out))",
    r".*\.(\d+\.output\.dense|mlp\.(fc2|dense2|down_proj|weights_out))",
)
_VIT_FUSED_QKV = Defaults(("qkv",), ("qkv", "mlp.fc2"), ("mlp.fc2",))

# Two towers of equal rank, image or audio and text: both are adapted.
_TWO_TOWERS = Defaults(
    r".*\.(query|value|q_proj|v_proj)",
    r".*\.(key|value|k_proj|v_proj|output\.dense|mlp\.fc2)",
    r".*\.(output\.dense|mlp\.fc2)",
)


def _inside(part: str, attention: str, keys_and_values: str, feedforward: str = "") -> Defaults:
    """Defaults for a model of several parts of which only one is adapted, never an image or sound tower beside it."""
    both = f"{keys_and_values}|{feedforward}" if feedforward else keys_and_values
    return Defaults(
        rf".*{part}\..*\.({attention})",
        rf".*{part}\..*\.({both})",
        rf".*{part}\..*\.({feedforward})" if feedforward else (),
    )


_LANGUAGE_MODEL = _inside("language_model", "q_proj|v_proj", "k_proj|v_proj", "down_proj")
_QFORMER = _inside("language_model", "q|v|q_proj|v_proj", "k|v|k_proj|v_proj", "wo|fc2")

_FAMILIES: tuple[tuple[Defaults, str], ...] = (
    # ---- decoders ---------------------------------------------------------------------------------------------------
    (
        _LLAMA,
        "apertus arcee bamba bitnet cohere cohere2 cwm diffllama doge dots1 ernie4_5 ernie4_5_moe esmc eurobert "
        "exaone4 exaone_moe falcon_h1 gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4v_moe_text "
        "glm4v_text glm_ocr_text granite granite_swa helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
        "hyperclovax internlm3 iquestcoder jais2 jamba kolibri1 llama mimo_v2_flash ministral ministral3 mistral "
        "mllama_text_model nemotron olmo olmo2 olmo3 olmo_hybrid qwen2_5_vl_text qwen2_moe qwen2_vl_text "
        "qwen3_vl_text recurrent_gemma seed_oss smollm3 solar_open stablelm vaultgemma",
    ),
    (
        Defaults(("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "v_proj", "down_proj"), ("down_proj",)),
        "nemotron_h",
    ),
    (_GEMMA, "gemma gemma2 gemma3_text llama4 llama4_text qwen2 qwen3"),
    (
        _STACKED_EXPERTS,
        "aria_text cohere2_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared mellum "
        "minimax_m2 olmoe phimoe qwen3_moe qwen3_vl_moe_text",
    ),
    (Defaults(("q_proj", "v_proj", "qkv_proj"), ("k_proj", "v_proj", "qkv_proj"), ()), "minimax"),
    (Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "w2"), ("w2",)), "mixtral lfm2 lfm3"),
    (Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "mlp.c_proj"), ("mlp.c_proj",)), "starcoder2"),
    (Defaults(("q_proj", "v_proj", "fc1", "fc2"), ("q_proj", "v_proj", "fc2"), ("fc2",)), "phi"),
    (Defaults(("qkv_proj",), ("qkv_proj", "down_proj"), ("down_proj",)), "phi3"),
    (
        _LATENT,
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 mistral4 youtu",
    ),
    (_GATED_DELTA, "qwen3_next qwen3_5_text qwen3_5_moe_text"),
    (_FUSED_QKV, "falcon RefinedWeb RefinedWebModel gpt_neox gpt_neox_japanese persimmon fuyu"),
    (
        Defaults(("query_key_value",), ("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
        "bloom",
    ),
    (Defaults(("query_key_value",)), "chatglm"),
    (_GPT2, "gpt2 gpt_bigcode openai-gpt imagegpt decision_transformer"),
    (Defaults(("c_proj", "c_attn")), "btlm"),
    (Defaults(("q_proj", "v_proj"), ("q_proj", "v_proj", "c_proj"), ("c_proj",)), "gpt_neo"),
    (Defaults(("q_proj", "v_proj"), ("q_proj", "v_proj", "fc_out"), ("fc_out",)), "gptj"),
    (Defaults(("qkv_proj",), ("qkv_proj", "fc_out"), ("fc_out",)), "codegen"),
    (Defaults(("Wqkv",), ("Wqkv", "ffn.down_proj"), ("ffn.down_proj",)), "mpt"),
    (Defaults(("Wqkv",), ("Wqkv",), ()), "dbrx"),
    (Defaults(("Wq", "Wv"), ("Wk", "Wv"), ()), "ctrl"),
    (_MAMBA, "mamba mamba2 falcon_mamba"),
    (Defaults(("key", "value", "receptance", "output")), "rwkv"),
    (Defaults(("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")), "rwkv7"),
    # ---- encoders ---------------------------------------------------------------------------------------------------
    (
        _BERT,
        "bert bert-generation bros camembert canine convbert data2vec-text dpr electra ernie esm flava layoutlm "
        "layoutlmv3 lilt longformer luke lxmert markuplm megatron-bert mobilebert mra nystromformer rembert roberta "
        "roberta-prelayernorm roc_bert roformer splinter tapas tvp vilt visual_bert xlm-roberta xlm-roberta-xl xmod "
        "yoso",
    ),
    # As BERT, but for a head that has an ``output.dense`` too.
    (
        Defaults(
            ("query", "value"),
            r".*\.(key|value|(attention|\d+)\.output\.dense)",
            r".*\.(attention|\d+)\.output\.dense",
        ),
        "big_bird",
    ),
    (Defaults(("query", "value"), ("key", "value", "ffn_output"), ("ffn_output",)), "albert"),
    (Defaults(("query", "value"), ("key", "value", "mlp.dense2"), ("mlp.dense2",)), "perceiver"),
    # Convolutions of width one in the place of linear layers.
    (Defaults(("query", "value")), "squeezebert"),
    (Defaults(("in_proj",), ("in_proj", "output.dense"), ("output.dense",)), "deberta"),
    (_DEBERTA_V2, "deberta-v2 sew-d"),
    (_XLM, "distilbert flaubert xlm"),
    (Defaults(("q", "v"), ("k", "v", "output.dense"), ("output.dense",)), "mpnet"),
    (Defaults(("q_head", "v_head"), ("k_head", "v_head", "linear_2"), ("linear_2",)), "funnel"),
    (Defaults(("Wqkv",), ("Wqkv", "mlp.Wo"), ("mlp.Wo",)), "modernbert"),
    (Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "mlp.Wo"), ("mlp.Wo",)), "modernbert-decoder"),
    (_LLAMA, "gte nomic_bert"),
    (_BART, "jina_embeddings_v3"),
    # ---- encoder-decoders -------------------------------------------------------------------------------------------
    (_T5, "t5 umt5 longt5 switch_transformers pop2piano udop"),
    (Defaults(("q", "v"), ("k", "v", "wi_1"), ()), "mt5"),
    (_LLAMA, "t5gemma"),
    (
        Defaults(
            r"(?!.*vision_tower).*\.(q_proj|v_proj)",
            r"(?!.*vision_tower).*\.(k_proj|v_proj|down_proj)",
            r"(?!.*vision_tower).*\.down_proj",
        ),
        "t5gemma2",
    ),
    (Defaults(("q_proj", "v_proj"), ("q_proj", "v_proj", "fc2"), ("fc2",)), "bart"),
    (Defaults(("q_proj", "v_proj"), ("q_proj", "k_proj", "fc2"), ("fc2",)), "opt"),
    (
        _BART,
        "biogpt blenderbot blenderbot-small fsmt m2m_100 marian mbart moonshine mvp nanochat nllb-moe pegasus "
        "pegasus_x plbart speech_to_text trocr whisper xglm",
    ),
    # Encoder and decoder name their projections differently.
    (
        Defaults(("query", "value", "q_proj", "v_proj"), ("key", "value", "k_proj", "v_proj", "fc2"), ("fc2",)),
        "bigbird_pegasus led",
    ),
    (
        Defaults(
            ("query_proj", "value_proj"), ("key_proj", "value_proj", "feed_forward.output"), ("feed_forward.output",)
        ),
        "prophetnet",
    ),
    (
        Defaults(("query", "value"), ("key", "value", "wo"), ("wo",)),
        "pix2struct",
    ),
    # ---- vision -----------------------------------------------------------------------------------------------------
    (
        _VIT,
        "audio-spectrogram-transformer beit data2vec-vision deit depth_pro dinov2 dinov2_with_registers dinov3_vit "
        "donut-swin dpt glpn ijepa maskformer-swin mobilevit pvt segformer swin swin2sr swinv2 videomae vit vit_mae "
        "vit_msn vivit yolos",
    ),
    (_VIT_FUSED_QKV, "hiera mgp-str vitdet"),
    (
        Defaults(("attention.qkv",), ("attention.qkv", "output.dense"), ("output.dense",)),
        "timesformer",
    ),
    (_BART, "chinese_clip_vision_model clip_vision_model mlcd_vision_model siglip_vision_model siglip2_vision_model"),
    (_LLAMA, "pixtral"),
    (Defaults(("qkv", "q_proj", "v_proj"), ("qkv", "k_proj", "v_proj", "lin2"), ("lin2",)), "sam sam_hq"),
    # ---- images or sounds beside text -------------------------------------------------------------------------------
    (
        _TWO_TOWERS,
        "align altclip bridgetower chinese_clip clip clipseg metaclip_2 owlv2 owlvit siglip siglip2 "
        "vision-text-dual-encoder xclip",
    ),
    (_BART, "clip_text_model"),
    (Defaults(("query", "value"), ("key", "value", "output.dense"), ("output.dense",)), "clap git"),
    (
        Defaults(
            ("query", "value", "qkv"), ("key", "value", "qkv", "output.dense", "mlp.fc2"), ("output.dense", "mlp.fc2")
        ),
        "blip",
    ),
    (
        Defaults(("q", "v", "q_proj", "v_proj"), _QFORMER.key_value_feedforward, _QFORMER.feedforward),
        "blip-2",
    ),
    (_QFORMER, "instructblip instructblipvideo"),
    (
        _LANGUAGE_MODEL,
        "aria audioflamingo3 aya_vision cohere2_vision deepseek_vl gemma3 gemma3n gemma4 gemma4_unified glm4v "
        "glm4v_moe glm_ocr got_ocr2 granite_speech internvl janus lighton_ocr llava llava_next llava_next_video "
        "llava_onevision mistral3 mllama ovis2 paddleocr_vl paligemma qwen2_5_vl qwen2_audio qwen2_vl qwen3_vl "
        "vibevoice_asr video_llama_3 video_llava vipllava voxtral",
    ),
    (_inside("language_model", "q_proj|v_proj", "k_proj|v_proj"), "qwen3_vl_moe"),
    (
        _inside("language_model", "q_proj|v_proj|in_proj_qkvz?", "k_proj|v_proj|in_proj_qkvz?", "down_proj"),
        "qwen3_5 qwen3_5_moe",
    ),
    (_inside("language_model", "q_proj|v_proj", "k_proj|v_proj", "fc2"), "florence2"),
    (_inside("language_model", "q_proj|v_proj", "k_proj|v_proj", "w2"), "lfm2_vl"),
    (_inside("text_model", "q_proj|v_proj", "k_proj|v_proj", "down_proj"), "idefics2 idefics3 smolvlm"),
    (_inside("text_model", "q_proj|v_proj", "k_proj|v_proj", "fc2"), "kosmos-2"),
    # ---- sound ------------------------------------------------------------------------------------------------------
    (_WAV2VEC2, "data2vec-audio hubert sew speecht5 unispeech unispeech-sat wav2vec2"),
    # Its attention reads the weights of its projections past any adapter: only the feed-forward layers are left.
    (Defaults(("intermediate_dense", "output_dense")), "wavlm"),
    (_CONFORMER, "wav2vec2-bert wav2vec2-conformer"),
    (
        Defaults(
            ("q_proj", "v_proj", "linear_q", "linear_v"),
            ("k_proj", "v_proj", "linear_k", "linear_v", "fc2", "output_dense"),
            ("fc2", "output_dense"),
        ),
        "seamless_m4t seamless_m4t_v2",
    ),
    (_BART, "qwen2_audio_encoder voxtral_encoder"),
    (Defaults(("q_proj", "v_proj"), ("k_proj", "v_proj", "linear2"), ("linear2",)), "parakeet_ctc parakeet_encoder"),
)


def _by_type() -> dict[str, Defaults]:
    """The table by model type; a type that stands in two families is a mistake."""
    table: dict[str, Defaults] = {}
    for defaults, names in _FAMILIES:
        for name in names.split():
            if name in table:
                raise AssertionError(f"model type {name!r} stands twice in the table of defaults")
            table[name] = defaults
    return table


DEFAULTS: Mapping[str, Defaults] = _by_type()
"""The whole table, by ``config.model_type``."""


def default_targets(model_type: str, role: str) -> list[str] | str | None:
    """The modules that play a role in a model type.

    Args:
        model_type: ``config.model_type`` of a transformers model.
        role: One of :data:`ROLES`.

    Returns:
        Names or ends of names, a regular expression for the whole name, or ``None`` where no default is known.

    Raises:
        ValueError: The role is not a column of the table.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r} of modules: the table of defaults has {', '.join(ROLES)}")
    defaults = DEFAULTS.get(model_type)
    targets = getattr(defaults, role) if defaults is not None else None
    return list(targets) if isinstance(targets, tuple) else targets


def closest_model_types(model_type: str, count: int = 3, known: Iterable[str] | None = None) -> list[str]:
    """Types in the table whose names are similar, the most similar first.

    Args:
        model_type: A type that is not in the table.
        count: How many to name at most.
        known: The types to choose from; those of the table when not given.
    """

    def plain(name: str) -> str:
        return name.lower().replace("-", "_")

    by_plain = {plain(name): name for name in (DEFAULTS if known is None else known)}
    wanted = plain(model_type)
    if not wanted:
        return []
    # A longer name that begins with a known one is mostly a variant of it, which ratios of lengths would not tell.
    variants = sorted((p for p in by_plain if wanted.startswith(p) and len(p) >= 2), key=len, reverse=True)
    similar = difflib.get_close_matches(wanted, list(by_plain), n=count, cutoff=0.6)
    return [by_plain[p] for p in dict.fromkeys((*variants[:1], *similar))][:count]


NESTED_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config", "generator_config")
"""Attributes under which composite configurations keep that of their language model."""


def model_types_of(config: Any) -> list[str]:
    """The model types under which defaults for a model are looked up, the best first.

    The model's own type comes first. A composite whose type is not in the table is treated as its language model, and
    an encoder-decoder made of two models of one type as that type; of two types neither would cover the other.

    Args:
        config: A model's configuration: an object, or a dictionary.
    """
    types = list(_walk(config))
    encoder, decoder = (_get(_get(config, part), "model_type") for part in ("encoder", "decoder"))
    if encoder and encoder == decoder:
        types.append(encoder)
    return list(dict.fromkeys(types))


def _walk(config: Any) -> Iterator[str]:
    own = _get(config, "model_type")
    if isinstance(own, str) and own:
        yield own
    for name in NESTED_TEXT_CONFIGS:
        nested = _get(config, name)
        if nested is not None and nested is not config:
            yield from _walk(nested)


def _get(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)
