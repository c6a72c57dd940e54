"""One picture a file: a function from figures to an Altair chart.

`theme.py` is what they share: colours for colour-blind people, sizes, compact data. Charts take
arrays and names; they know nothing of plans, verbs or pages. The folder above puts them on a page
(`page.py`) and on paper (`pictures.py`).
"""
