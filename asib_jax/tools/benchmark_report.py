"""A benchmark's figures as the tables that `launch/benchmark.py` prints."""

from typing import Any

from asib_jax.tools.benchmark import TITLES

_NOTES = """\
A-Step, B-Step: of the first stage; reading is not part of those from stored outputs. PyTorch: tests/torch_asib.py,
  which runs every network in every step; /PyTorch is the median of the rounds' ratios.
MFLOP: of a training step for an image, 2 operations for a multiply-add, as XLA counts them before it optimises.
compile s: the first call less the second, tracing included; cache: programs read from / added to jax's cache.
projected: reading the views (the teachers' once, the student's in every stage) and all epochs, with ready teachers;
  without evaluations, the control, calibration of BatchNorm and compilation; stored outputs on the devices."""


def text(report: dict[str, Any]) -> str:
    """The report of `measure`, with its "config", as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    images, shape = report["images"], "x".join(map(str, report["image_shape"]))
    ours = [used for name, used in report["warm_up"].items() if not name.startswith("torch")]
    return "\n".join(
        [
            f"{report['config']}{', random images and weights' if report['synthetic'] else ''}: "
            f"{', '.join(report['networks'])}; "
            f"{images['train']:,} training and {images['validation']:,} validation images {shape}, "
            f"{report['classes']} classes, batches of {report['batch_size']}, {report['compute_dtype']}",
            f"{report['devices']} x {report['device_kind']}, cores: {report['cores']}, hosts: {report['hosts']}",
            versions,
            f"medians of {report['rounds']} rounds in turn, {report['seconds_each']:g} s each in all",
            "",
            *_rate_table(report),
            "",
            f"to the end of the first call of a training step: {report['first_step_seconds']:.1f} s; to start with, "
            "data, networks, teachers and compilation",
            *(
                f"one view of the training images, {TITLES[name]}: {seconds:.3g} s"
                for name, seconds in report["view_seconds"].items()
            ),
            f"peak memory, all of the above: {max(used['peak_bytes'] for used in ours) / 2**30:.3g} GiB of "
            + ("the process" if report["platform"] == "cpu" else "a device"),
            f"large matrix products, {report['compute_dtype']}: {report['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
            "",
            *_projection_table(report),
            "",
            _NOTES,
        ]
    )


def _rate_table(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':<25}{'images/s':>10}{'slowest':>10}{'fastest':>10}{'/PyTorch':>10}{'MFLOP/image':>13}"
        f"{'TFLOP/s':>10}{'of matmul':>11}{'compile s':>11}  cache"
    ]
    for name, rate in report["images_per_second"].items():
        rounds, warm = report["images_per_second_of_each_round"][name], report["warm_up"][name]
        line = f"{TITLES[name]:<25}{rate:>10,.0f}{min(rounds):>10,.0f}{max(rounds):>10,.0f}"
        line += f"{report['ratio_to_torch'][name]:>10.2f}" if name in report["ratio_to_torch"] else " " * 10
        if name in report["flops_per_image"]:
            line += (
                f"{report['flops_per_image'][name] / 1e6:>13,.2f}{report['flops_per_second'][name] / 1e12:>10.3g}"
                f"{report['share_of_matmul'][name]:>11.1%}"
            )
        else:
            line += " " * 34
        lines.append(f"{line}{warm['compile_seconds']:>11.1f}  {warm['from_cache']}/{warm['new_in_cache']}")
    return lines


def _projection_table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'projected from rates':<25}{'A-views':>10}{'B-views':>10}{'seconds':>12}{'PyTorch':>12}{'ratio':>10}"]
    for row in report["projected_from_rates"]:
        line = f"{row['part']:<25}{row['a_views'] or 'new':>10}{row['b_views'] or 'new':>10}{row['seconds']:>12,.1f}"
        lines.append(line + (f"{row['torch_seconds']:>12,.1f}{row['ratio']:>10.2f}" if "ratio" in row else ""))
    return lines
