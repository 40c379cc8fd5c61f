"""Logistic regression of classes: scikit-learn's, with the penalty that predicts left-out images best."""

import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit

from optim.linear import PENALTIES, fit_softmax


def test_the_fit_is_the_logistic_regression_that_predicts_left_out_images_best():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (240,), generator=draw)
    features = torch.randn(3, 60, generator=draw)[labels] / 4 + torch.randn(240, 60, generator=draw)
    features = (features - features.mean(dim=0)).double()
    weight, bias, loss, _ = fit_softmax(features, labels, 3)
    strengths = [1 / penalty / 240 / features.square().mean().item() for penalty in PENALTIES]
    fifths = PredefinedSplit(labels.argsort(stable=True).argsort() % 5)
    rival = LogisticRegressionCV(
        Cs=strengths, cv=fifths, scoring="neg_log_loss", l1_ratios=(0,), use_legacy_attributes=True
    )
    probs = rival.fit(features, labels).predict_proba(features)
    assert abs((features @ weight.T + bias).softmax(dim=1) - probs).max() < 0.02
    assert abs(loss + rival.scores_[2].mean(axis=0).max()) < 2e-3


def test_features_may_tell_nothing_and_a_class_may_have_one_image():
    weight, _, loss, _ = fit_softmax(torch.zeros(9, 4).double(), torch.tensor([0] * 5 + [1] * 3 + [2]), 3)
    assert loss < 2 and not weight.any()
