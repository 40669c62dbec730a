import re

from resmem_lm.report.plots import INKS, STYLES, line, to_svg


def test_a_plot_has_its_colors_outside_of_a_page_too():
    def draw(figure):
        axes = figure.subplots()
        for number in range(len(STYLES)):
            line(axes, number, [1, 2], [number, number + 1], f"line {number}")

    svg = to_svg(draw)
    assert set(re.findall(r"var\((.*?)\)", svg)) == {f"--ink-{number}, {ink}" for number, ink in INKS.items()}
    assert to_svg(draw) == svg
