"""The tiniest reward model of every architecture that transformers has a sequence classifier for, and pairs to feed it.

    default configuration -> every size that it has, made small -> what the architecture wants beside that -> model

So a promise about any classifier can be tried on all of them in seconds: `for architecture in ARCHITECTURES`.
"""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from normbt_kernels.data.packing import pack
from tests.tiny_classifiers import HIDDEN, PAD, VOCABULARY, make_batch

BOS, EOS = 2, 1

# Each size, under all the names that configurations have for it.
SIZES = (
    (VOCABULARY, "vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size num_hash_buckets"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim embedding_size dim d_latents pooler_hidden_size"),
    (HIDDEN, "true_hidden_size intra_bottleneck_size input_embedding_size output_embedding_size entity_emb_size"),
    (HIDDEN, "pronunciation_embed_dim shape_embed_dim prediction_head_size out_hidden_size"),
    (32, "intermediate_size ffn_hidden_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff hidden_dim d_inner"),
    (32, "moe_intermediate_size shared_expert_intermediate_size feed_forward_size"),
    (32, "max_position_embeddings n_positions num_position_embeddings max_2d_position_embeddings"),
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth"),
    (2, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (2, "num_self_attention_heads num_cross_attention_heads num_self_attends_per_block patch_size"),
    (2, "num_experts n_routed_experts num_local_experts"),
    (1, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk n_shared_experts n_group topk_group"),
    (8, "head_dim d_kv d_head kv_channels attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (8, "index_head_dim linear_key_head_dim linear_value_head_dim image_size"),
    (4, "kv_lora_rank q_lora_rank linear_num_key_heads linear_num_value_heads mamba_d_state mamba_dt_rank num_latents"),
    (4, "mm_tokens_per_image xpath_unit_hidden_size max_xpath_tag_unit_embeddings max_xpath_subs_unit_embeddings"),
    (4, "sliding_window local_attention window_size attention_window"),
    (0.3, "initializer_range init_std"),
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id decoder_start_token_id"),
    (EOS, "eos_token_id"),
)
SMALL = {name: value for value, names in SIZES for name in names.split()}

AS_MANY_KEYS = {"num_key_value_heads": 2}  # as queries
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

# What an architecture wants beside small sizes.
PECULIAR = {
    "axk1": AS_MANY_KEYS,
    "axk2": AS_MANY_KEYS,
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": AS_MANY_KEYS,
    "deepseek_v3": AS_MANY_KEYS,
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "esmc": AS_MANY_KEYS,
    "funnel": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 2, "shape_size": 4},
    "lilt": {"hidden_size": 24},
    "markuplm": {"tag_pad_id": 3, "subs_pad_id": 3},
    "minicpm3": AS_MANY_KEYS,
    "mistral4": AS_MANY_KEYS | {"head_dim": 16},
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False, "local_attn_chunk_length": 8},
    "t5": {"decoder_start_token_id": PAD},
    "tapas": {"type_vocab_sizes": [3, 4, 4, 2, 4, 4, 10]},
    "xmod": {"default_language": "en_XX"},
    "zamba": AS_MANY_KEYS | {"num_hidden_layers": 4, "attn_layer_period": 1, "attn_layer_offset": 0},
    "zamba2": AS_MANY_KEYS | {"layers_block_type": ["linear_attention", "hybrid"]},
}

# What no configuration makes buildable here.
NOT_BUILDABLE = {
    "layoutlmv2": "needs detectron2",
}
ARCHITECTURES = tuple(name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name not in NOT_BUILDABLE)


def make_classifier(architecture):
    """A model of two layers with a scalar head and no dropout, the same one every time, in training mode."""
    config = AutoConfig.for_model(architecture)
    config = type(config)(num_labels=1, **small_sizes(config))
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).train()


def small_sizes(config):
    """Keyword arguments that make a configuration like this one small, and those within it (text, vision) too."""
    sizes = {name: value for name, value in SMALL.items() if name in vars(config)}
    sizes |= {name: type(value)(0) for name, value in vars(config).items() if "drop" in name and value is not None}
    within = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    sizes |= {name: type(value)(**small_sizes(value)) for name, value in within.items()}
    return sizes | PECULIAR.get(config.model_type, {})


def make_pairs(num_pairs=2, side="right"):
    """`input_ids`, `attention_mask` (2P, S): as `make_batch`, ended by <eos>, where bart and t5 are scored."""
    batch = make_batch(num_pairs, side=side)
    rows = torch.arange(len(batch["input_ids"]))
    last = (batch["attention_mask"] * torch.arange(batch["input_ids"].shape[1])).argmax(dim=1)
    batch["input_ids"][rows, last] = EOS
    return batch


def outcomes(architecture):
    """What becomes of each shortcut: "exact", in rewards and gradients, or the sentence that refuses it."""
    from normbt_kernels.integrations.shortcuts import PACKED_SDPA, attention_of, install_shortcuts, remove_shortcuts

    model, batch = make_classifier(architecture), make_pairs(3)
    one_row = pack(**batch, pad_token_id=PAD, one_row=True)
    plain = rewards_and_gradient(model, batch)
    found = {}
    for name in ("late_pooling", "padding_free"):
        try:
            install_shortcuts(model, **{name: True})
            seen = rewards_and_gradient(model, batch)
        except ValueError as refusal:
            found[name] = str(refusal)
        else:
            found[name] = "exact"
            assert_near(seen, plain, 1e-6)
            if attention_of(model) == PACKED_SDPA:  # which a GPU has take one row
                assert_near(rewards_and_gradient(model, one_row), plain, 2e-6)
        if hasattr(model, "normbt_shortcuts"):
            remove_shortcuts(model)
    return found


def assert_near(seen, expected, relative):
    for value, right in zip(seen, expected, strict=True):
        assert (value - right).norm() <= relative * right.norm()


def rewards_and_gradient(model, batch):
    """The rewards of the batch, and the gradient of some function of them with respect to all parameters."""
    model.zero_grad(set_to_none=False)
    rewards = model(**batch).logits.squeeze(-1)
    (rewards * torch.linspace(-1, 1, len(rewards))).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return rewards.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def table():
    """Which architectures take which shortcut, as `docs/whole-step.md` has it: `python -m tests.every_classifier`."""
    rows = {(True, True): [], (True, False): [], (False, True): [], (False, False): []}
    for architecture in ARCHITECTURES:
        rows[tuple(outcome == "exact" for outcome in outcomes(architecture).values())].append(architecture)
    names = ("both", "late pooling", "padding-free", "neither")
    return "\n".join(f"| {name} | {', '.join(row)} |" for name, row in zip(names, rows.values(), strict=True) if row)


if __name__ == "__main__":
    print(table())
