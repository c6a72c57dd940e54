"""Which share of the traffic is held back from what, and why: the one home of these shares.

What a plan was made from flatters it, so some requests judge it and nothing else. Whole requests
are held back, never some of a request's tokens: those are similar. (Recorded steps keep their
order, so of those the last ones are held back.)

* `VALIDATION_SHARE`, inside a planner: it chooses among the candidates of a search. A quarter is
  enough for a choice, and the planner's answer is judged again by whoever asked for it.
* `ADVICE_SHARE`, in `advise`: it ranks whole plans against the current one and sets the bands of
  the verdict. Planning gets the larger part, because its answer is the product.
* `EVEN_SHARE`, where both sides count equally: a control loop's candidate must show its gain beyond
  the noise of one window, so the judging half must be as telling as the planning half;
  cross-validation uses each half both ways; a what-if or a cache comparison asks how a plan or a
  predictor does on traffic that it does not know, at any scale.

How long a trace must be is asked on half of it too (`traces/analysis/learning_curve.py`, a lower
floor). Knows nothing of how anything is split.
"""

VALIDATION_SHARE = 0.25
ADVICE_SHARE = 0.3
EVEN_SHARE = 0.5
