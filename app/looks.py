"""Colours, spacing and the few rules of CSS that gradio's own theme has no name for."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container main { max-width: 1320px !important; margin: 0 auto; }
#title h1 { margin-bottom: 0; } #title p { color: var(--body-text-color-subdued); margin-top: 0.15rem; }
.hint { color: var(--body-text-color-subdued); font-size: 0.92rem; }
.status { padding: 0.5rem 0.75rem; border-radius: 10px; min-height: 3.1rem; }
.status { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.status.problem { background: var(--error-background-fill); color: var(--error-text-color); }
.status .bar { height: 4px; margin-top: 0.4rem; border-radius: 2px; background: var(--border-color-primary); }
.status .bar div { height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.3s; }
.status.problem .bar { visibility: hidden; }
.note:not(:empty), #trigger-warning { padding: 0.4rem 0.75rem; border-left: 3px solid var(--color-accent); }
.note ul { margin: 0; padding-left: 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 0.75rem; }
.card { display: flex; gap: 0.75rem; padding: 0.75rem; border-radius: 12px; text-align: left; cursor: pointer; }
.card { background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); }
.card { overflow-wrap: anywhere; }
.card:hover, .card:focus-visible { border-color: var(--color-accent); }
.card img, .card > span:first-child { width: 72px; height: 72px; border-radius: 8px; flex: none; object-fit: cover; }
.card > span:first-child { background: var(--background-fill-secondary); }
.card .misfit { color: var(--error-text-color); }
.card small { color: var(--body-text-color-subdued); }
.about { width: 100%; font-size: 0.92rem; }
.about th { text-align: left; vertical-align: top; padding-right: 1rem; font-weight: 600; }
.about td { overflow-wrap: anywhere; }
#curve { color: var(--body-text-color-subdued); font-size: 0.8rem; }
#curve .dots, #curve .mean { stroke: var(--color-accent); }
#photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.photo-tools { gap: 0.35rem; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-400); }
footer { display: none !important; }
"""
HEAD = """<meta name="description" content="Pictures of your own subjects, with OFT adapters">"""


def theme() -> Any:
    """The Soft theme of gradio, in teal on warm grays, with titles as plain text and contrasts of at least 4.5."""
    import gradio as gr

    plain = "*block_background_fill"
    return gr.themes.Soft(
        primary_hue="teal", secondary_hue="stone", neutral_hue="stone", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    ).set(
        block_title_background_fill=plain, block_title_background_fill_dark=plain, block_title_padding="0",
        block_title_text_color="*body_text_color", block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600", block_label_background_fill=plain, block_label_background_fill_dark=plain,
        block_label_text_color="*body_text_color", block_label_text_color_dark="*body_text_color",
        block_border_width="1px", body_background_fill="*neutral_100",
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        color_accent="*primary_700", link_text_color="*primary_700", link_text_color_dark="*primary_300",
        checkbox_label_background_fill_selected_dark="*primary_800",
        checkbox_label_text_color="*body_text_color", checkbox_label_text_color_selected="*body_text_color",
    )  # fmt: skip
