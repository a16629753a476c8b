"""Every nnsight trace of the project: prefill, record, extend, score, write.

A plan runs in chunks of cells, each in steps, one file a step:

1. `prefill`: the opening of every unique prompt leaves its KV cache; what openings share (the
   template, a persona) runs once. The last few tokens, the *tail* (from the first asked prompt
   position to ``p_last``), stay out of it.
2. `record`: a traced ``generate`` from the tails decodes XY's clean continuation and reads its
   residuals at every asked site. Then the tails of BB, XB and BY run, once per prompt, and for
   sites in the continuation their cells are teacher-forced onto it.
3. `extend`: tails and continuation of each host prompt run once unedited. This keeps the clean
   log-probabilities, the KV cache, and, at the layers to be edited, the residuals of every token.
4. `score`: rows of (cell, edit) run from the edited token on with residuals overwritten. What lies
   below the lowest edited layer is unchanged by the edit, so those layers are skipped and the
   stored residuals enter at the edited layer. KL is taken inside the trace; only numbers leave.
5. `write`: greedy text under the edits, if the plan asks for it.

What an edit does to its rows there is said by kind of intervention, in one place (`acts`).

Rows of different cells and conditions share batches (`memory`): padding stands on the left and
positions are explicit. Caches are cut and brought together (`kv_cache`) where no sliding window has
let go of tokens; where one has, openings run whole and edited rows begin at the tail.

The clean log-probabilities could be had from decoding. They are computed again, teacher-forced like
the edited rows, so that in low precision both are rounded alike.

The engine is meant to run as it is on a remote server: it imports torch, nnsight, transformers and
the plain-data modules of this package, and returns small things.
"""
