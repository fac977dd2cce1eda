"""Whether PyTorch's own attention is right on this machine: the five lines of the README, and a page."""

import sys

from refattn.testing import check

report = check("torch.nn.functional:scaled_dot_product_attention", profile="torch", arithmetic="fp32")
print(report)
if len(sys.argv) > 1:
    report.to_html(sys.argv[1])
sys.exit(not report.ok)
