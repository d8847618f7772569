"""The record itself: do chosen logprob, rank and top-k of one token contradict each other, on which side, how often?

`examine` looks at two aligned traces; `side_columns` is what one side says, `within_side` holds a side against itself,
`between_sides` both sides against each other, `contradiction` the findings.
"""

from .contradiction import Record as Record
from .examine import examine as examine
from .examine import topk_judged as topk_judged
