"""What users of diffusers do with a transformer, and what a quantized one does then, with the tests that show it.

``python -m tests.runtime.uses`` writes ``docs/behaviours.md``; ``tests/runtime/test_uses.py`` compares it, and checks
that each test exists and that those of refusals expect an error.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/behaviours.md"


class Result(enum.Enum):
    """What happens."""

    WORKS = "works"
    REFUSED = "refused"
    DIFFERENT = "does not apply"
    """It asks about modules or weights in them, which a graph does not have."""


@dataclass(frozen=True)
class Use:
    """One thing that users do.

    Attributes:
        what: What they do.
        result: What happens.
        note: What to know, or to do instead.
        tests: Tests that show it, as ``folder/file::test``, without the leading ``test_`` of both names.
    """

    what: str
    result: Result
    note: str
    tests: tuple[str, ...] = ()


def works(what: str, note: str, *tests: str) -> Use:
    return Use(what, Result.WORKS, note, tests)


def refused(what: str, note: str, *tests: str) -> Use:
    return Use(what, Result.REFUSED, note, tests)


def different(what: str, note: str, *tests: str) -> Use:
    return Use(what, Result.DIFFERENT, note, tests)


USES: dict[str, list[Use]] = {
    "Calls": [
        works("Two calls with the same inputs", "the same bits", "runtime/uses::outputs"),
        works("`return_dict` true and false", "the class of the original, or a tuple", "runtime/uses::outputs"),
        works(
            "Another batch size, resolution, length of the prompt",
            "another batch size takes the same graph where the model allows, other sizes capture one",
            "zoo/zoo::quantizes_and_runs_at_other_sizes",
        ),
        works(
            "Callbacks of pipelines that change latents, embeddings of prompts, or guidance",
            "they see the pipeline, and the next call what they changed",
            "runtime/in_pipelines::what_a_callback_changes_reaches_the_model",
            "runtime/in_pipelines::callbacks_of_flux",
            "runtime/in_pipelines::a_callback_that_ends_guidance_halves_the_batch",
        ),
        works(
            "`pipe._interrupt`",
            "the model is not called again",
            "runtime/in_pipelines::an_interrupted_run_calls_the_model_no_more",
        ),
        works(
            "Options of attention: residuals of ControlNets, image prompts, `joint_attention_kwargs`",
            "each set of inputs is a kind of call with a graph of its own",
            "adapters/exact::every_kind_of_call_has_the_lora",
        ),
        works(
            "Guidance that skips layers (SD3)",
            "a kind of call; the tensors are shared",
            "runtime/in_pipelines::guidance_that_skips_layers_is_a_kind_of_call",
        ),
        works("Hooks of torch on the whole model", "run around every call", "runtime/drop_in::a_hook_of_torch_runs"),
    ],
    "Saving and loading": [
        works(
            "`save_pretrained`, `from_pretrained`, in another process",
            "the same bits",
            "pretrained/from_pretrained::a_new_process",
            "pretrained/from_pretrained::saving_it_again",
        ),
        works(
            "Shards, `max_shard_size`",
            "with the index of diffusers",
            "pretrained/from_pretrained::it_is_what_load_returns",
        ),
        works("Loading shards in parallel", "", "runtime/uses::shards_that_are_loaded_in_parallel"),
        works(
            "`variant`",
            "of model and pipeline; a folder of a variant is refused without it, as by diffusers",
            "pretrained/from_pretrained::variants",
        ),
        works(
            "A part of a pipeline given to `from_pretrained`",
            "`transformer=fxquant.load(...)`",
            "pretrained/from_pretrained::a_pipeline_takes_a_quantized_part",
        ),
        works(
            "Pipelines with parts that are None, and with two transformers",
            "",
            "two_experts::one_may_be_missing",
            "storage/diffusers_io::optional_parts_and_a_second_transformer",
        ),
        works(
            "`torch_dtype` or `dtype`, also other than that of the checkpoint",
            "the bits of `.to(dtype)`; of models, VAEs, text encoders and pipelines",
            "pretrained/other_dtypes::the_bits_are_those_of_a_converted_model",
            "pretrained/other_dtypes::vaes",
            "pretrained/other_dtypes::text_encoders",
        ),
        works(
            "`dtype` per part of a pipeline",
            "",
            "pretrained/from_pretrained::a_dtype_per_part",
            "pretrained/other_dtypes::pipelines",
        ),
        works(
            "Layers that a class keeps in float32",
            "stay in it, quantized or not",
            "storage/checkpoint::dtypes_other_than_those_of_the_class",
            "pretrained/other_dtypes::layers_that_a_class_keeps_in_float32",
        ),
        works(
            "`device_map` with one device, `low_cpu_mem_usage=True`, `use_safetensors=True`",
            "",
            "pretrained/from_pretrained::options_that_are_accepted",
        ),
        works("`push_to_hub`", "", "storage/pretrained::push_to_hub", "storage/pretrained::save_and_push"),
        works(
            "`torch.save`, pickle, `copy.deepcopy`",
            "a pickle holds a checkpoint",
            "storage/pickling::a_quantized_model_survives",
            "runtime/model::a_shallow_copy_shares_tensors_and_calls_itself",
        ),
        works(
            "A quantized encoder of text, and a quantized VAE, in a pipeline",
            "saved and loaded with it",
            "cli/components::two_experts_of_a_variant",
            "storage/parts::pipelines",
        ),
        refused(
            "`safe_serialization=False`",
            "it asks for a pickle",
            "storage/pretrained::options_that_are_refused",
        ),
        refused(
            "A dtype of 8 bits; a part that is given to `load_pipeline` in another dtype",
            "convert the part with `.to(dtype)`",
            "pretrained/other_dtypes::what_is_refused",
        ),
        refused(
            '`device_map="auto"` and maps of several devices; `low_cpu_mem_usage=False`',
            "a graph runs on one device",
            "pretrained/from_pretrained::options_that_are_refused",
        ),
        refused(
            "Damaged, missing or edited files",
            "names the file",
            "pretrained/from_pretrained::a_damaged_checkpoint",
            "storage/checkpoint::a_flipped_byte",
        ),
        refused("`from_single_file`", "call it on the class", "runtime/drop_in::what_to_do_instead"),
        refused(
            "`register_to_config`",
            "the config describes what was captured",
            "pretrained/from_pretrained::it_is_what_load_returns",
        ),
        different(
            '`model.config["quantization_config"]`',
            "in `config.json` of the checkpoint; on the model, `plan` says what was decided",
            "pretrained/from_pretrained::at_the_first_call",
        ),
    ],
    "Devices, dtypes and memory": [
        works("`to(device)`, `pipe.to(device)`, and back", "", "runtime/moving::on_a_second_device"),
        works(
            "`pipe.enable_model_cpu_offload()`, before or after quantization",
            "",
            "runtime/moving::on_a_second_device",
            "runtime/offloading::a_pipeline_that_is_offloaded_already",
        ),
        works("`pipe.enable_sequential_cpu_offload()`", "", "runtime/moving::on_a_second_device"),
        works(
            "Group offloading, by blocks and by leaves",
            "each tensor moves for the op that reads it",
            "runtime/moving::every_backend_is_offloaded",
            "runtime/moving::on_a_second_device",
        ),
        works(
            "`num_parameters()`, `get_memory_footprint()`",
            "the parameters of the original; the bytes that are held",
            "runtime/moving::the_size_is_that_of_the_quantized_model",
            "runtime/moving::no_float_weight_stays",
        ),
        works("`share_memory()`", "if all tensors are plain", "runtime/moving::shared_memory"),
        works(
            "`to(dtype)`, `half()`, `float()`, `double()` to another dtype",
            "the graphs are traced again, the codes stay",
            "runtime/converting::it_computes_in_the_dtype",
            "runtime/converting::a_pipeline_is_converted_whole",
            "runtime/converting::loras_stay",
            "runtime/converting::a_traced_model_is_converted_beside_its_original",
        ),
        works(
            "`pipe.to(...)` that a part refuses",
            "refused before any part changes",
            "runtime/converting::a_pipeline_is_refused_before_a_part_changes",
        ),
        refused(
            "`use_stream`, `record_stream`, `offload_to_disk_path`, `exclude_kwargs` of group offloading",
            "leave them out",
            "runtime/moving::options_of_group_offload",
        ),
        refused(
            "Offloading to files",
            "use `accelerate.cpu_offload`",
            "runtime/moving::offload_to_files_is_refused_and_changes_nothing",
        ),
        refused(
            "Spreading a model over devices, `accelerate.dispatch_model`",
            "a graph runs on one device",
            "runtime/moving::a_device_map_with_several_devices_is_refused",
        ),
        refused(
            "Layerwise casting",
            "weights have few bits already",
            "runtime/drop_in::what_to_do_instead",
        ),
        refused(
            "Functions of `diffusers.hooks`, such as `apply_layerwise_casting`; hooks on parts",
            "use the methods of the model",
            "runtime/views::what_walks_over_modules_is_refused",
        ),
        refused("`to_empty`, the meta device", "", "runtime/drop_in::modes_and_devices_that_there_are_not"),
        refused("`dequantize()`", "use the float model", "runtime/drop_in::what_to_do_instead"),
    ],
    "LoRA": [
        works(
            "`load_lora_weights`, `load_lora_adapter`, their effect on the output",
            "that of the float model, whatever the recipe",
            "adapters/exact::a_lora_acts_on_the_coordinates_of_the_original_model",
            "adapters/pipelines::the_life_of_loras_in_a_pipeline",
        ),
        works(
            "Several adapters, weights, one of them deleted; unload",
            "",
            "adapters/methods::each_method_does_the_same_as_on_the_float_model",
            "adapters/methods::switched_off_the_model_is_what_it_was_bit_for_bit",
        ),
        works(
            "A scale per call, `joint_attention_kwargs`",
            "without a LoRA it changes nothing",
            "adapters/pipelines::the_life_of_loras_in_a_pipeline",
            "runtime/in_pipelines::the_strength_of_loras_that_there_are_not_changes_nothing",
        ),
        works(
            "Ranks and alphas per layer",
            "",
            "adapters/methods::alphas_and_ranks_of_each_layer",
        ),
        works(
            "Hot swap, also of a compiled model",
            "values change, nothing is compiled again; for a higher rank or further layers the graphs are traced again",
            "adapters/methods::a_hot_swap_changes_values_only",
            "adapters/methods::a_hot_swap_to_a_higher_rank_makes_room",
            "adapters/compiled::a_swap_compiles_nothing",
        ),
        works(
            "Saving an adapter with peft's metadata",
            "read by both",
            "adapters/methods::a_written_adapter_is_read_by_both",
        ),
        works(
            "`get_peft_model_state_dict(pipe.transformer)`, for `pipe.save_lora_weights`",
            "the tensors as they were loaded; `state_dict()` holds them by the names of peft",
            "adapters/methods::peft_finds_the_tensors_in_the_state_dict",
            "adapters/methods::tensors_of_an_adapter_that_are_loaded_count",
        ),
        works(
            "Saving a pipeline with LoRAs",
            "they are part of the checkpoint",
            "adapters/pipelines::a_pipeline_with_loras_is_saved_and_loaded",
        ),
        works("An adapter of another dtype", "cast", "adapters/methods::a_lora_of_another_dtype_is_cast"),
        works(
            "Keys of kohya, xlabs and BFL",
            "by the converters of diffusers",
            "adapters/pipelines::keys_of_kohya_and_xlabs",
            "adapters/bfl_keys::every_layer_is_found",
        ),
        works(
            "A LoRA of a model with fewer inputs",
            "the first inputs, as by diffusers",
            "adapters/pipelines::a_lora_of_a_model_with_fewer_inputs_reads_the_first",
        ),
        works(
            "`fuse_lora` of the float model, before it is quantized",
            "",
            "adapters/pipelines::a_lora_that_was_fused_before",
        ),
        works(
            "No keys of the model in a file",
            "diffusers logs it; nothing changes",
            "adapters/refusals::keys_of_another_component_change_nothing",
        ),
        refused(
            "`fuse_lora`, `unfuse_lora`, `add_adapter` on the quantized model",
            "codes cannot take a LoRA and are not trained",
            "adapters/refusals::what_only_the_float_model_can_do",
        ),
        refused(
            "DoRA, LoKr, biases, convolutions, other sizes, unknown layers and keys",
            "names the layer",
            "adapters/refusals::what_does_not_fit_is_refused_by_name",
        ),
        refused(
            "Metadata that does not fit; a file with one factor of a layer only",
            "names what is missing",
            "adapters/refusals::metadata_that_does_not_fit",
            "adapters/refusals::what_does_not_fit_is_refused_by_name",
        ),
        refused("Control-LoRAs", "fuse them", "adapters/pipelines::a_control_lora_is_refused_by_name"),
        refused(
            "A wrong name; a name in use; NaN in an adapter",
            "what is loaded stays",
            "adapters/refusals::an_adapter_that_is_loaded_stays_when_another_is_refused",
        ),
        refused(
            "Quantizing a float model with a LoRA that is not fused",
            "fuse it, or load it into the quantized model",
            "adapters/refusals::a_float_model_with_a_lora_is_not_quantized",
        ),
        different(
            "Layers of peft in `model.modules()`",
            "a LoRA is ops in the graph; `peft_config` and `active_adapters()` say what is loaded",
            "adapters/methods::each_method_does_the_same_as_on_the_float_model",
        ),
    ],
    "Caches of steps": [
        works(
            "`enable_cache` with `FirstBlockCacheConfig`, `MagCacheConfig`, `TaylorSeerCacheConfig`, "
            "`PyramidAttentionBroadcastConfig`",
            "the same steps are skipped as on the float model",
            "runtime/step_caches::computes_what_diffusers_computes",
            "runtime/step_caches::extrapolates_as_diffusers_does",
            "runtime/step_caches::broadcasts_as_diffusers_does",
            "runtime/step_caches::every_backend",
        ),
        works(
            "`disable_cache`, `cache_context`, a second generation",
            "nothing is left of the first, also if it was interrupted",
            "runtime/step_caches::a_cache_that_never_skips_changes_no_bit",
            "runtime/step_caches::contexts_are_apart",
            "runtime/step_caches::a_generation_does_not_read_what_another_one_left",
        ),
        works(
            "A cache with the residuals of a ControlNet",
            "each step adds its own once; diffusers adds those of the last full step and its own",
            "runtime/cached_controlnets::residuals_are_those_of_the_step",
        ),
        refused(
            "`FasterCacheConfig`, `SeaCacheConfig`, `TextKVCacheConfig`; a second cache",
            "a first-block cache needs no module; `disable_cache()` first",
            "runtime/step_caches::other_caches_are_refused",
        ),
        refused(
            "Caches of attentions on the backend `native`",
            "it computes them together with the ops that follow; cache whole blocks",
            "runtime/step_caches::modules_that_a_backend_fuses_are_refused",
        ),
        refused(
            "Models without blocks, or whose output also reads from within blocks",
            "leave the cache out",
            "runtime/step_caches::graphs_that_cannot_be_cut_are_refused",
            "runtime/step_caches::models_without_blocks_are_refused",
        ),
        refused(
            "Configs with values that no cache can use, such as NaN or an interval of 0; other objects",
            "the message names the field and what it may hold",
            "runtime/step_caches::wrong_values_are_refused_by_name",
            "runtime/step_caches::other_caches_are_refused",
        ),
        refused(
            "Caches of modules whose results the recipe shifts by timestep; of blocks that it scales differently",
            "name attentions or whole blocks; another recipe",
            "runtime/changed_borders::values_that_move_with_the_timestep_are_refused",
            "runtime/changed_borders::blocks_that_are_scaled_differently_are_refused",
        ),
        refused(
            "A cache that was enabled before quantization",
            "`disable_cache()` first: no state of one step is captured",
            "capture/hooks::a_cache_of_steps_is_not_captured",
        ),
    ],
    "Compilation": [
        works(
            "`torch.compile(model, fullgraph=True)`, a second call",
            "one graph, no compilation again",
            "runtime/torch_compile::within_a_larger_function_the_graph_does_not_break",
            "runtime/torch_compile::it_compiles_once_for_all_batch_sizes",
        ),
        works(
            "Other sizes with `dynamic=True`",
            "one compilation where graphs differ in sizes only",
            "runtime/compiling::dynamic_sizes_take_one_compilation",
        ),
        works(
            "`compile_repeated_blocks`",
            "one compilation for all blocks that are alike, also while they are offloaded",
            "runtime/compiling::all_blocks_and_batch_sizes_take_one_compilation",
            "runtime/compiling::blocks_of_an_offloaded_model_are_compiled",
        ),
        works(
            "`torch.compile` of an offloaded model",
            "it runs without being compiled, and a warning says so",
            "runtime/offloading::an_offloaded_model_that_is_compiled_warns_once",
        ),
        works(
            "Ahead of time",
            "`fxquant.export_aot`",
            "storage/aot/package::outputs_are_the_models",
        ),
    ],
    "Attention": [
        works(
            "Processors, backends and `fuse_qkv_projections()` of the float model",
            "captured as they are",
            "zoo/zoo::absorption_is_exact_and_covers_what_the_page_says",
        ),
        refused(
            "`set_attn_processor`, `attn_processors`, `set_attention_backend`, xformers, `fuse_qkv_projections()`",
            "choose them in the float model",
            "runtime/drop_in::what_to_do_instead",
        ),
        refused(
            "Loading an IP-Adapter",
            "load it into the float model",
            "adapters/pipelines::what_pipelines_cannot_do_to_it_raises",
        ),
        refused(
            "`enable_parallelism`, contexts on several devices",
            "a graph runs on one device",
            "runtime/in_pipelines::parallelism_is_refused_by_name",
        ),
    ],
    "Training": [
        works(
            "Gradients through a model that was only traced",
            "",
            "runtime/torch_compile::gradients_pass_through_a_traced_model",
        ),
        refused("`train()`", "train the float model", "runtime/drop_in::modes_and_devices_that_there_are_not"),
        refused("Gradient checkpointing", "it is for training", "runtime/drop_in::what_to_do_instead"),
        different(
            "Gradients of the weights, averages of weights",
            "codes are not trained, and no parameter requires gradients",
            "runtime/uses::nothing_is_trained",
        ),
    ],
}
"""Everything on the page, by section."""

HEAD = """# Behaviours

What users of diffusers do with a transformer, and what a quantized one does then. The list follows what diffusers tests
of its own models and pipelines. Each row is shown by a test of fxquant, or says why the question does not arise. A
**refusal** is an error that says what to do instead, and changes nothing. [Living in diffusers](diffusers.md) explains
the same in order, and lists every public method.
"""


def page() -> str:
    """The page."""
    lines = [HEAD]
    for section, uses in USES.items():
        lines += [f"## {section}\n", "| what | result | |", "|---|---|---|"]
        lines += [f"| {use.what} | {use.result.value} | {use.note} |" for use in uses]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
