"""torchvision, importable on a PyTorch without CUDA: its wheel registers fakes for operators it then cannot load."""

import torch

if torch.version.cuda is None:
    _LIBRARY = torch.library.Library("torchvision", "DEF")  # kept: declarations end with it
    for _name in (
        "nms",
        "qnms",
        "roi_align",
        "_roi_align_backward",
        "roi_pool",
        "_roi_pool_backward",
        "ps_roi_align",
        "_ps_roi_align_backward",
        "ps_roi_pool",
        "_ps_roi_pool_backward",
        "deform_conv2d",
        "_deform_conv2d_backward",
    ):
        _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")

import torchvision  # noqa: F401, others find it imported
