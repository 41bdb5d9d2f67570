"""What is no rule, or has an attribute that no rule can have, is refused in one line, before any network is seen."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from enginery import LLM
from enginery.errors import RewriteError, UsageError
from enginery.rewriting import PatternRewriter, RewritePatternManager, Var, has_rank


class Silu(PatternRewriter):
    pattern = F.silu(Var("x"))

    def rewrite(self, x):
        return x


@pytest.mark.parametrize(
    ("attribute", "value", "cause"),
    [
        ("pattern", 5, "its pattern is no pattern ("),
        ("pattern", (), "its pattern is no pattern ("),
        ("where", 5, "its where is no list of constraints ("),
        ("where", (5,), "its where is no list of constraints ("),
        ("where", has_rank("x", 2), "its where is no list of constraints ("),
        ("benefit", "high", "its benefit is no whole number ("),
        ("expect", "many", "its expect is no count ("),
        ("expect", True, "its expect is no count ("),
        ("args", 5, "its args is no mapping ("),
    ],
)
def test_an_attribute_that_no_rule_can_have(attribute, value, cause):
    rule = type("Mine", (Silu,), {attribute: value})
    with pytest.raises(RewriteError) as caught:
        RewritePatternManager(rule())
    assert str(caught.value).startswith(f"rule Mine: {cause}{__file__}:")
    assert "\n" not in str(caught.value)
    assert caught.value.rule == "Mine"


@pytest.mark.parametrize(
    ("attribute", "value"), [("expect", 0), ("expect", "each layer"), ("where", []), ("where", {has_rank("x", 2)})]
)
def test_what_a_rule_can_have(attribute, value):
    assert RewritePatternManager(type("Mine", (Silu,), {attribute: value})()).labels == ("Mine",)


NO_RULE = "an object of class object is no rule. Derive the class from enginery.rewriting.PatternRewriter"
NO_INSTANCE = "Silu is a class. Give a rule made of it, Silu()"


@pytest.mark.parametrize(("rule", "line"), [(object(), NO_RULE), (Silu, NO_INSTANCE)])
def test_what_is_no_rule(rule, line):
    with pytest.raises(UsageError) as caught:
        RewritePatternManager(rule)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rules": None}, "rules is None. Give a tuple of rules, or () for none"),
        ({"rules": Silu()}, "rules is <rule Silu>. Give a tuple of rules, or () for none"),
        ({"rules": [object()]}, NO_RULE),
        ({"rules": [Silu]}, NO_INSTANCE),
        ({"disabled_rules": [5]}, "disabled_rules has 5. Give the names of rules, such as 'MergeReshapes'"),
        ({"disabled_rules": "DeadCode"}, "disabled_rules is 'DeadCode'. Give a tuple of rule names, or () for none"),
    ],
)
def test_a_model_is_given_rules_or_says_what_it_was_given(settings, line):
    with pytest.raises(UsageError) as caught:
        LLM(backend="eager", **settings)
    assert str(caught.value) == line
