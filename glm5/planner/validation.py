"""The planner against published figures: `python -m glm5.planner.validation` prints the table of docs/planner.md.

Each row gives the bound that the test holds the ratio to. Rows marked "set" were used to choose an efficiency or a
latency of `hardware.CLASSES`, so their agreement proves nothing; the others were not used. Published speeds come from
different engine versions, prompts and dates; where a source does not state something, the row's note says what was
assumed. Apart from the row measured on the 2-core machine, this project reproduced none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from glm5.config import ModelConfig
from glm5.config.glm47 import GLM47Config
from glm5.planner.hardware import Device, Hardware, hardware_from
from glm5.planner.plan import Estimate, best_estimate, smallest_sets
from glm5.planner.serving import Serving
from glm5.planner.shape import ModelShape, shape_of
from glm5.planner.training import TrainingPlan, training_memory

_RTX4090 = Device(
    name="RTX4090-48G", kind="consumer", memory_gb=48, bandwidth_gb_s=1008, bf16_tflops=165, fp8_tflops=330,
    link_gb_s=25, link_latency_us=30, node_devices=8, network_gb_s=12.5, network_latency_us=60, source="datasheet",
)  # fmt: skip
_RYZEN = Device(
    name="Ryzen3995WX", kind="cpu", memory_gb=512, bandwidth_gb_s=204.8, bf16_tflops=5.5,
    source="datasheet: 8 channels DDR4-3200; 64 cores x 2.7 GHz x 32 FP32 operations a cycle (AVX2)",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published figure; `ratio` is predicted over published and lies within `bound` either way."""

    what: str
    predicted: float
    published: float
    unit: str
    bound: float
    source: str
    set_on: bool = False

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published

    @property
    def holds(self) -> bool:
        """Whether the ratio is within the bound."""
        return 1 / self.bound <= self.ratio <= self.bound


def rows() -> tuple[Row, ...]:
    """Every comparison."""
    glm5 = _shape("glm-5")
    return (*_sizes(glm5), *_sets(glm5), *_servers(glm5), *_small_machines(glm5), *_ratios(glm5), *_training())


def table() -> str:
    """The rows as a Markdown table."""
    lines = ["| figure | predicted | published | ratio | bound | source |", "|---|---|---|---|---|---|"]
    for row in rows():
        bound = "exact" if row.bound == 1 else f"{row.bound:g}x" + (", set" if row.set_on else "")
        lines.append(
            f"| {row.what} | {row.predicted:,.4g} {row.unit} | {row.published:,.4g} {row.unit} | {row.ratio:.2f} | "
            f"{bound} | {row.source} |"
        )
    return "\n".join(lines)


def _shape(preset: str) -> ModelShape:
    return shape_of(ModelConfig.from_preset(preset), preset)


def _sizes(shape: ModelShape) -> list[Row]:
    def gigabytes(dtype: str) -> float:
        serving = Serving(dtype=dtype, context=1)
        return best_estimate(shape, serving, hardware_from("H200x32")).memory.weights.value / 1e9

    cache = best_estimate(shape, Serving(context=202_752), hardware_from("H200x8")).memory.cache.value / 1e9
    return [
        Row("weights with MTP, BF16", gigabytes("bf16"), 1510, "GB", 1.01, "Hugging Face page"),
        Row("weights with MTP, FP8", gigabytes("fp8"), 756, "GB", 1.01, "FP8 repository, tensor by tensor"),
        Row("weights with MTP, int4", gigabytes("int4"), 405, "GB", 1.1, "canada-quant, W4A16 with BF16 MTP"),
        Row("weights, 4.5 bits (MLX)", gigabytes("int4"), 424, "GB", 1.1, "spicyneuron, peak on an M3 Ultra"),
        Row("cache at 202,752 tokens, BF16", cache, 22.5, "GB", 1.01, "own arithmetic; with the MTP row and its key"),
    ]


def _sets(shape: ModelShape) -> list[Row]:
    """Smallest sets that hold the model and one short request; published counts are those of deployment guides."""

    def count(model: ModelShape, dtype: str, device: str) -> int:
        options = smallest_sets(model, Serving(dtype=dtype, context=8192))
        return next(o.devices for o in options if o.device == device)

    old = shape_of(GLM47Config(), "glm-4.7")
    guide = "GLM-4.5 README, standard context"
    cases = [
        (shape, "fp8", "H200", 8, "vLLM recipe: 8xH200"),
        (shape, "fp8", "B200", 8, "TensorRT-LLM guide: 8xB200"),
        (shape, "int4", "H200", 4, "canada-quant: 4xH200"),
        (shape, "int4", "B200", 4, "NVIDIA Dynamo recipe: 4xB200, NVFP4"),
        (shape, "int4", "DGXSpark", 4, "NVIDIA forum 374832: 4 machines, NVFP4"),
        (shape, "int4", "MacStudioM3Ultra", 1, "spicyneuron: one machine, 4.5 bits"),
        (old, "bf16", "H100", 16, guide), (old, "bf16", "H200", 8, guide),
        (old, "fp8", "H100", 8, guide), (old, "fp8", "H200", 4, guide),
    ]  # fmt: skip
    return [
        Row(
            f"smallest set, {model.name} {dtype} on {device}",
            count(model, dtype, device),
            published,
            "devices",
            1,
            source,
        )
        for model, dtype, device, published, source in cases
    ]


def _tensor_parallel(shape: ModelShape, serving: Serving, hardware: Hardware) -> Estimate:
    return best_estimate(shape, serving, hardware, tensor=min(hardware.count, shape.heads))


def closed_loop(shape: ModelShape, serving: Serving, hardware: Hardware, prompt: int, output: int) -> float:
    """Output tokens per second when prompts take turns in prefill and their machine decodes in between."""
    decoding = _tensor_parallel(shape, replace(serving, context=prompt + output // 2), hardware).decode
    prefill = _tensor_parallel(shape, replace(serving, context=prompt, concurrency=1), hardware).prefill
    n = serving.concurrency
    return n * output / (n * prefill.seconds.value + output * decoding.token_seconds.value)


def _servers(shape: ModelShape) -> list[Row]:
    h200, b200 = hardware_from("H200x8"), hardware_from("B200x8")
    one = Serving(context=1536)
    eagle = replace(one, drafts=3, accept_length=3.48)
    vllm = replace(one, context=8704, concurrency=32, drafts=3, accept_length=1.64)

    def token_ms(serving: Serving, hardware: Hardware) -> float:
        return 1e3 * _tensor_parallel(shape, serving, hardware).decode.token_seconds.value

    prompt = _tensor_parallel(shape, replace(one, context=8192), h200).prefill.seconds.value
    short_prompt = _tensor_parallel(shape, replace(one, context=1024), h200).prefill.seconds.value
    vllm_output = closed_loop(shape, vllm, h200, 8192, 1024)
    lambda_1k = closed_loop(shape, replace(vllm, accept_length=2.25), b200, 8192, 1024)
    lambda_2k = closed_loop(shape, replace(vllm, accept_length=2.48), b200, 8192, 2048)
    cards = best_estimate(shape, one, Hardware(_RTX4090, 32)).decode.per_request.value
    gist = "gist of BenHamm, 2026-02-13 (SGLang, batch 1, 1K/1K)"
    recipe = "vLLM recipe (8K/1K, 32 prompts at once, accept length 1.64)"
    page = "accept length: its ITL x rate"
    return [
        Row("8xB200 FP8, no drafts: time per token", token_ms(one, b200), 20.2, "ms", 1.1, gist, set_on=True),
        Row("8xH200 FP8, accept 3.48: time per token", token_ms(eagle, h200), 7.54, "ms", 1.25, gist),
        Row("8xB200 FP8, accept 3.52: time per token", token_ms(replace(eagle, accept_length=3.52), b200), 7.69, "ms",
            1.25, gist),
        Row("8xH200 FP8, 32 prompts: time per token", token_ms(vllm, h200), 34.6, "ms", 1.25, recipe),
        Row("8xH200 FP8, 32 prompts: output", vllm_output, 526.6, "tok/s", 1.5, recipe),
        Row("8xH200 FP8, 32 prompts: median first token", 16 * prompt, 14.5, "s", 2.0, f"{recipe}; half the prompts"),
        Row("8xH200 FP8: first token after 1K", 1e3 * short_prompt, 282, "ms", 4.0, f"{gist}; its server included"),
        Row("8xB200 FP8, 32 requests, 8K/1K: output", lambda_1k, 700, "tok/s", 2.0, f"lambda.ai, GLM-5; {page}"),
        Row("8xB200 FP8, 32 requests, 8K/2K: output", lambda_2k, 1345, "tok/s", 1.5, f"lambda.ai, GLM-5.1; {page}"),
        Row("32xRTX 4090-48G FP8: one request", cards, 24, "tok/s", 2.0, "renning22/glm-5.2-4090"),
    ]  # fmt: skip


def _small_machines(shape: ModelShape) -> list[Row]:
    short = Serving(dtype="int4", context=1024, mtp=False)

    def run(name: str) -> Estimate:
        return best_estimate(shape, short, hardware_from(name))

    mac, spark, ryzen = run("MacStudioM3Ultra"), run("DGXSparkx4"), best_estimate(shape, short, Hardware(_RYZEN, 1))
    slow, fast = (
        best_estimate(shape, short, Hardware(replace(hardware_from("CPU24GB").device, disk_gb_s=rate), 1))
        for rate in (1.2, 2.2)
    )
    forum, mlx, ik = "NVIDIA forum 374832", "spicyneuron, MLX, 4.5 bits", "ik_llama.cpp #2068, Q4_K_M"
    bound = "own bound (inference notes), cold cache"
    return [
        _speed("Mac Studio M3 Ultra: decode", mac, 17.3, 1.25, mlx, set_on=True),
        _speed("Mac Studio M3 Ultra: prefill", mac, 194, 1.25, mlx, set_on=True),
        _speed("4xDGX Spark: decode", spark, 15.25, 1.25, f"{forum}: 14.5 to 16"),
        _speed("4xDGX Spark: prefill", spark, 512, 1.25, forum, set_on=True),
        _speed("Ryzen 3995WX: decode", ryzen, 3.83, 1.25, f"{ik}: 3.78 to 3.87", set_on=True),
        _speed("Ryzen 3995WX: prefill", ryzen, 34.7, 1.25, f"{ik}: 32.6 to 36.8", set_on=True),
        _speed("24 GB, NVMe at 1.2 GB/s: decode", slow, 0.09, 1.1, bound),
        _speed("24 GB, NVMe at 2.2 GB/s: decode", fast, 0.17, 1.1, bound),
        _speed("24 GB, NVMe at 1.2 GB/s: decode, colibri", slow, 0.075, 1.5, "colibri docs, 25 GB: 0.05 to 0.1"),
    ]


def _speed(what: str, e: Estimate, published: float, bound: float, source: str, *, set_on: bool = False) -> Row:
    rate = e.prefill.throughput if "prefill" in what else e.decode.per_request
    return Row(what, rate.value, published, "tok/s", bound, source, set_on)


def _ratios(shape: ModelShape) -> list[Row]:
    old, shared = shape_of(GLM47Config(), "glm-4.7"), _shape("glm-5.2")
    machine = hardware_from("H200x8")
    load = Serving(context=8192, concurrency=64)
    new_cost, old_cost = best_estimate(shape, load, machine), best_estimate(old, load, machine)
    output = new_cost.output_cost.value / old_cost.output_cost.value
    prompt = new_cost.input_cost.value / old_cost.input_cost.value
    active = shape.active_parameters() / old.active_parameters()

    def long_flops(model: ModelShape) -> float:
        return best_estimate(model, Serving(context=1_000_000), hardware_from("EPYC9755")).decode.flops.value

    full = replace(shared, attention=replace(shared.attention, indexer_layers=shared.layers))
    context, a = 202_752, shape.attention
    dense_over_sparse = a.decode_flops * context / (a.decode_flops * a.topk + a.indexer_flops * context)
    prices = "list prices of z.ai"
    return [
        Row("GLM-5 over GLM-4.7: active weights", active, 40 / 32, "x", 1.1, "report, table 10"),
        Row("GLM-5 over GLM-4.7: cost of an output token", output, 3.2 / 2.2, "x", 1.5, f"{prices}: $3.2 and $2.2"),
        Row("GLM-5 over GLM-4.7: cost of an input token", prompt, 1.0 / 0.6, "x", 2.0, f"{prices}: $1 and $0.6"),
        Row("IndexShare: operations per token at 1M", long_flops(full) / long_flops(shared), 2.9, "x", 1.5,
            "Z.ai on GLM-5.2"),
        Row("attention of one layer at 202,752, dense over DSA", dense_over_sparse, 175 / 10.4, "x", 1.25,
            "measured on this project's 2-core machine, one thread"),
    ]  # fmt: skip


def _training() -> list[Row]:
    """Devices of the smallest context-parallel group under which a 128K SFT step fits, 13 pipeline stages."""
    config = ModelConfig.from_preset("glm-5.2")

    def fits(context: int) -> bool:
        plan = TrainingPlan(pipeline=13, context=context, expert=context, sequence=131_072, optimizer="adamw")
        return training_memory(config, plan, hardware_from(f"H100x{plan.devices}")).fits

    smallest = next(size for size in (1, 2, 4, 8, 16, 32, 64) if fits(size))
    source = "Megatron-Bridge recipe, SFT of GLM-5.2, BF16, 128K, PP13 CP32 (EP as wide as CP assumed)"
    return [Row("training: H100 count", 13 * smallest, 416, "devices", 1, source)]


if __name__ == "__main__":
    print(table())
