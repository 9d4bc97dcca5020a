"""A module with extra state, for several tests."""

from torch import nn


class Keeping(nn.Module):
    """Its extra state is the value that it was given."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return x
