"""Pages of printed text: drawn for teaching and testing, and the samples that are bundled."""

from trtvlm.model.pages.page import KINDS, Page, PageSpec, render_page
from trtvlm.model.pages.samples import load_samples

__all__ = ["KINDS", "Page", "PageSpec", "load_samples", "render_page"]
