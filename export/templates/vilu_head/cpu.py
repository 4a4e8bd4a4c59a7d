"""This Triton Python model answers for image embeddings over one of the server's class sets.

The graphs beside it decide the outputs: vilu_head gives the answer and vilu_details the details.
"""

import head  # the export copies it beside this file


class TritonPythonModel(head.Head):
    pass
