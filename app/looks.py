"""Colours, spacing, the few rules of CSS that gradio's own theme has no name for, and keys where it has none."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container main { width: 100%; max-width: 1320px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; } #title p { color: var(--body-text-color-subdued); margin-top: 0.15rem; }
.hint, .hint * { color: var(--body-text-color-subdued); }
.html-container { padding: 0 !important; }
.status { padding: 0.5rem 0.75rem; border-radius: var(--block-radius); min-height: 3.1rem; }
.status { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.status.problem { background: #fef2f2; color: #991b1b; border-color: #dc2626; }
.dark .status.problem { background: #3b1518; color: #fecaca; border-color: #f87171; }
.status .bar { height: 4px; margin-top: 0.4rem; border-radius: 2px; background: var(--border-color-primary); }
.status .bar div { height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.3s; }
.status.problem .bar { visibility: hidden; }
/* a thumb is white, as what lies around it nearly is */
input[type=range]::-webkit-slider-thumb { box-sizing: border-box; border: 2px solid var(--color-accent) !important; }
input[type=range]::-moz-range-thumb { box-sizing: border-box; border: 2px solid var(--color-accent) !important; }
.note:not(:empty) { padding: 0.4rem 0.75rem; border-left: 3px solid var(--color-accent); }
.note ul { margin: 0; padding-left: 1.1rem; }
.block:has(.note:empty):not(:has(.block)) { margin-top: calc(-1 * var(--layout-gap)); }
#stage { position: relative; isolation: isolate; } /* nothing moves as an unfinished picture comes and goes */
#stage > #preview { position: absolute; inset: 0; z-index: 99; height: auto !important; }
#stage:has(#pictures img) > #preview { inset: auto 0.75rem 0.75rem auto; width: min(11rem, 40%); }
#stage:has(#pictures img) > #preview { height: auto !important; aspect-ratio: 1; }
#compare-stage { position: relative; isolation: isolate; }
#compare-stage:has(#sheet img) > #compare-preview { position: absolute; z-index: 99; inset: 0.75rem 0.75rem auto auto; }
#compare-stage:has(#sheet img) > #compare-preview { width: min(11rem, 40%); height: auto !important; aspect-ratio: 1; }
:is(#preview, #compare-preview) :is(.image-container, .image-frame) { height: 100%; }
:is(#preview, #compare-preview) img { width: 100%; height: 100%; object-fit: contain; }
.slot-tools { align-items: center; justify-content: space-between; padding: 0.35rem 0.75rem 0.5rem; }
.slot-tools { background: var(--block-background-fill); }
.slot-tools .block { border-width: 0; background: none; box-shadow: none; padding: 0; }
/* in galleries, the caption has its place below the picture, whether that is one of many or shown alone */
.thumbnail-lg { display: flex; flex-direction: column; }
.thumbnail-lg > img { flex: 1; height: 0; min-height: 0; padding: 0.3rem 0.3rem 0; }
.thumbnail-lg > .caption-label { position: static; width: 100%; max-width: none; padding: 0.15rem 0.5rem; border: 0; }
.thumbnail-lg > .caption-label { background: none; font-size: 0.8rem; text-align: center; }
.thumbnail-lg:hover > .caption-label { opacity: 1 !important; }
.preview > .caption { max-width: 100%; }
#train-grids .thumbnail-lg { aspect-ratio: auto; height: auto; } /* a sheet is wide */
#train-grids .thumbnail-lg > img { flex: none; height: auto; }
/* whoever uses no mouse sees where they are */
:is(button, a, input, textarea, summary, [tabindex]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px;
}
.dark :is(button, a, input, textarea, summary, [tabindex]):focus-visible { outline-color: #2dd4bf !important; }
.empty { padding: 2.5rem 1rem; border: 1px dashed var(--border-color-primary); border-radius: var(--block-radius); }
.column:has(:is(#sheet, #compare-preview) img) > #compare-empty { display: none; }
.column:has(#curve svg) > #train-empty { display: none; }
.empty { text-align: center; color: var(--body-text-color-subdued); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 0.75rem; }
.card { display: flex; gap: 0.75rem; padding: 0.75rem; border-radius: var(--block-radius); text-align: left; }
.card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); cursor: pointer; }
.card { line-height: 1.5; overflow-wrap: anywhere; }
.card:hover, .card:focus-visible { border-color: var(--color-accent); }
.card img, .card > span:first-child { width: 88px; height: 88px; border-radius: 8px; flex: none; object-fit: cover; }
.card > span:first-child { background: var(--background-fill-secondary); }
.card b { font-size: 1.05rem; font-weight: 600; }
.card .misfit { color: #991b1b; } .dark .card .misfit { color: #fecaca; }
.card time { white-space: nowrap; }
.card small { color: var(--body-text-color-subdued); font-size: 0.85rem; }
#about:has(table) { padding: 0.35rem 0.75rem 0.6rem; border: 1px solid var(--border-color-primary); }
#about:has(table) { border-radius: var(--block-radius); background: var(--block-background-fill); }
#about:not(:has(table)) { margin-top: calc(-1 * var(--layout-gap)); }
#about details { margin-top: 0.5rem; } #about details[open] { max-height: 24rem; overflow-y: auto; }
#about summary { cursor: pointer; }
.about { width: 100%; border-collapse: collapse; }
.about th, .about td { padding: 0.4rem 0; text-align: left; vertical-align: top; }
.about tr + tr > * { border-top: 1px solid var(--border-color-primary); }
.about th { width: 1%; padding-right: 1.25rem; font-weight: 400; white-space: nowrap; }
.about th { color: var(--body-text-color-subdued); }
.about td { overflow-wrap: anywhere; }
#about details th { white-space: normal; width: 45%; }
#curve:not(:has(svg)) { margin-top: calc(-1 * var(--layout-gap)); }
#curve { color: var(--body-text-color-subdued); font-size: 0.8rem; }
#curve:has(svg) { margin-bottom: 1.25rem; } /* its labels hang out of it */
#curve .dots, #curve .mean { stroke: var(--color-accent); }
.dark #curve .dots, .dark #curve .mean { stroke: var(--primary-400); }
#fixed { display: flex; flex-direction: column; justify-content: end; }
#run-trigger label, #run-class label { display: flex; flex-direction: column; height: 100%; }
#run-trigger label > :last-child, #run-class label > :last-child { margin-top: auto; }
#slider .icon { color: white; }
#photos-clear { align-self: center; }
#photos:not(:has(*)) { margin-top: calc(-1 * var(--layout-gap)); }
#photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.photo-tools { gap: 0.35rem; }
/* for those who listen */
.photo-tools :is([data-testid=block-info], [data-testid=block-label]) { position: absolute; clip-path: inset(50%); }
[data-testid=upload-icon] { display: none; } /* it lies under the label */
.dark button[role=tab][aria-selected=true] { color: var(--primary-400); }
footer { display: none !important; }
@media (max-width: 640px) {
  .tab-container button { padding-left: 0.55rem; padding-right: 0.55rem; } /* all four have room at 360 pixels */
  label.float { font-size: 0.8rem; } #slider label.float { font-size: 0.7rem; } /* beside it are buttons */
  #history .grid-container { grid-template-columns: repeat(2, minmax(100px, 1fr)); }
  button.lg { padding-left: 0.5rem; padding-right: 0.5rem; font-size: 0.95rem; }
  #pictures, #pictures .grid-wrap { height: auto !important; min-height: 320px; }
  #pictures > .empty { min-height: 318px; }
}
"""
# Gradio's slider over two pictures says nothing of them and knows no keys: it is told what a mouse would tell it.
_SLIDER = """
const texts = ['The picture without the adapter', 'The picture with the adapter']
const keys = {ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, Home: -100, End: 100}
function equip(slider, handle) {
  const pictures = slider.querySelectorAll('img')
  pictures.forEach((picture, index) => { picture.alt = texts[index] })
  const place = () => {
    const whole = handle.parentElement.getBoundingClientRect(), own = handle.getBoundingClientRect()
    const width = Math.min(whole.width, whole.height * (pictures[0].naturalWidth / pictures[0].naturalHeight || 1))
    const left = whole.left + (whole.width - width) / 2
    return {left, width, percent: Math.round(100 * (own.left + own.width / 2 - left) / width)}
  }
  const told = {role: 'slider', tabindex: 0, 'aria-label': 'How much is shown without the adapter, in percent',
                'aria-valuemin': 0, 'aria-valuemax': 100}
  for (const [name, value] of Object.entries(told)) handle.setAttribute(name, value)
  const tell = () => handle.setAttribute('aria-valuenow', place().percent)
  new MutationObserver(tell).observe(handle, {attributeFilter: ['style']})
  tell()
  handle.addEventListener('keydown', event => {
    if (!(event.key in keys)) return
    event.preventDefault()
    const {left, width, percent} = place()
    const clientX = left + width * Math.min(100, Math.max(0, percent + keys[event.key])) / 100
    handle.dispatchEvent(new MouseEvent('mousedown', {clientX, view: window}))
    window.dispatchEvent(new MouseEvent('mouseup', {clientX, view: window}))
  })
}
new MutationObserver(() => {
  const slider = document.getElementById('slider'), handle = slider?.querySelector('[data-testid=slider]')
  if (handle && handle.tabIndex < 0) equip(slider, handle)
}).observe(document, {childList: true, subtree: true})
"""
# Gradio confines CSS to what lies within the page; its own margins lie around it.
HEAD = f"""<meta name="description" content="Pictures of your own subjects, with OFT adapters">
<style>@media (max-width: 640px) {{ .gradio-container > .main.app {{ padding: 0.75rem; }} }}</style>
<script>{{{_SLIDER}}}</script>"""


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
        checkbox_border_color="*neutral_500", input_border_color="*neutral_300", input_border_width="1px",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        color_accent="*primary_700", link_text_color="*primary_700", link_text_color_dark="*primary_300",
        button_secondary_background_fill_hover_dark="*neutral_600",
        button_cancel_background_fill_hover_dark="*neutral_600", checkbox_label_background_fill_selected="*primary_100",
        checkbox_label_background_fill_selected_dark="*primary_800",
        checkbox_label_text_color="*body_text_color", checkbox_label_text_color_selected="*body_text_color",
    )  # fmt: skip
