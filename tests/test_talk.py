"""The words of the small model: questions by form, answers, both languages."""

import numpy as np
import pytest

from vita_jax.data import talk


@pytest.mark.parametrize("lang", talk.LANGS)
def test_every_form_fills_and_is_trained_on_or_held_out(lang):
    seen = set()
    for task in talk.FORMS:
        trained, held_out = (talk.forms(task, lang, out) for out in (False, True))
        assert trained and not set(trained) & set(held_out)
        for form in trained + held_out:
            question = talk.fill(form, lang, "apple", "red", "left")
            assert "{" not in question and "*" not in question
            assert question.isascii() == (lang == "en")
            seen.add((task, question))
    trained, held_out = (talk.small_talk(lang, out) for out in (False, True))
    number = sum(len(forms[lang]) for forms in talk.FORMS.values()) + len(trained + held_out)
    assert number >= 190
    out = number - len(trained) - sum(len(talk.forms(task, lang, False)) for task in talk.FORMS)
    assert 0.1 <= out / number < 0.16
    assert len(seen) >= 150  # few forms are the same question


def test_answers():
    assert talk.name("cat", "猫", "en") == "This is a cat."
    assert talk.name("apple", "苹果", "en") == "This is an apple."
    assert talk.name("grapes", "葡萄", "en") == "These are grapes."
    assert talk.name("glass of milk", "一杯奶", "en") == "This is a glass of milk."
    assert talk.name("fried rice", "炒饭", "en") == "This is fried rice."
    assert talk.name("bus", "公共汽车", "zh") == "这是公共汽车。"
    assert talk.count(1, "bus", "en") == "There is one bus."
    assert talk.count(2, "bus", "en") == "There are two buses."
    assert talk.count(6, "fish", "zh") == "有六条鱼。"
    assert talk.place("cat", "middle", "en") == "The cat is in the middle."
    assert talk.place("cat", "top", "zh") == "猫在上面。"
    assert talk.move("dog", "left", "zh") == "狗向左移动。"
    assert talk.colour("key", "teal", "en") == "The key is teal."
    assert talk.pair("apple", "cat", "en") == "I see an apple and a cat."
    assert talk.pair("apple", "cat", "zh") == "我看到苹果和猫。"
    assert (
        talk.quality("circle", "zh") == "它是圆形。" and talk.quality("red", "en") == "It is red."
    )
    assert talk.kind(4, "en") == "This is food or drink."


def test_slots_agree_with_their_words():
    assert talk.fill("Is this a {noun}?", "en", noun="apple") == "Is this an apple?"
    assert talk.fill("Is this a {noun}?", "en", noun=("salt", "盐")) == "Is this salt?"
    assert talk.fill("有几{unit}{noun}？", "zh", noun="horse") == "有几匹马？"
    assert talk.fill("Count the {nouns}.", "en", noun="bus") == "Count the buses."
    assert talk.fill("{side}是什么？", "zh", side="top") == "上面是什么？"


def test_questions_are_drawn_from_the_right_forms():
    rng = np.random.default_rng(0)
    asked = {talk.ask("where", "en", rng, False, noun="cat") for _ in range(400)}
    other = {talk.ask("where", "en", rng, True, noun="cat") for _ in range(400)}
    assert "Where is the cat?" in asked
    assert {"Can you say where the cat is?", "Do you see where the cat is?"} <= other
    assert len(other) == len(talk.forms("where", "en", True))
    assert len(asked) == len(talk.forms("where", "en", False)) and not asked & other


def test_all_answers_are_said_once():
    for lang in talk.LANGS:
        every = talk.answers(lang)
        assert len(every) > 900 and len(set(every)) == len(every)
        assert talk.count(3, "cat", lang) in every and talk.said("unknown", lang) in every
