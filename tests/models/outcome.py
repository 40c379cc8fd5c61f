"""What a module gives and how it learns: for tests that compare two modules."""


def outcome(module, x, grad=None, **inputs):
    """Return the output, the gradient of x, and those of the parameters; grad: of the output, or its square's."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    output = module(x, **inputs)
    output.backward(2 * output.detach() if grad is None else grad)
    return [output.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]
