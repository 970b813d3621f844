import torch
import torch.nn.functional as F

from mgt_fast.kernels.activations import softplus


def test_softplus():
    x = torch.tensor([-800.0, -40, -1e-9, 0, 3, 19, 21, 800], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softplus(x), F.softplus(x))
    (grad,) = torch.autograd.grad(softplus(x).sum(), x)
    # F.softplus is linear above 20; there the true slope differs from 1 by 2e-9 at most.
    torch.testing.assert_close(grad, torch.sigmoid(x.detach()), rtol=1e-12, atol=3e-9)
    torch.testing.assert_close(grad[:6], torch.sigmoid(x.detach()[:6]), rtol=1e-12, atol=0)
