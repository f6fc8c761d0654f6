"""Figures of `fastvlm-bench`'s reports: `--plot DIR` and `fastvlm-bench plot`.

series.py      reports, checked, as what the figures show
naming.py      what the models are called in a figure, and its heading
style.py       colours for a light and a dark page, sizes, numbers
sheet.py       the page around a figure's axes
placing.py     where labels go
breakdown.py   the time to first token by stage
ttft.py        the time to first token over resolution
roofline.py    what the stages reach of the machine's limits
drawing.py     all of them, as files
cli.py         the command
"""
