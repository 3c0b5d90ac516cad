from d2f.text import Tokenizer
from d2f.training.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["Ann has 12 apples.", "Bob has 345 apples and 12 pears.\n#### 357"] * 5


def test_digits_stand_alone_and_special_ids_come_first(tmp_path):
    tokenizer = Tokenizer.load(train_tokenizer(TEXTS, tmp_path, vocab_size=300))
    assert 260 < tokenizer.vocab_size <= 300
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    digits = [tokenizer.encode(digit)[0] for digit in "345"]
    assert tokenizer.encode("345") == digits
    text = "Zoë has 9 apples.\n#### 9"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_is_bos_question_answer(tmp_path):
    tokenizer = Tokenizer.load(train_tokenizer(TEXTS, tmp_path, vocab_size=300))
    assert tokenizer.encode_prompt("Ann?") == [1, *tokenizer.encode("Ann?"), 3]


def test_same_texts_same_files(tmp_path):
    first, second = (train_tokenizer(TEXTS, tmp_path / n, vocab_size=300) for n in "ab")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_transformers_reads_it_alike(tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = train_tokenizer(TEXTS, tmp_path, vocab_size=300)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.load(folder)
    message = [{"role": "user", "content": "Ann has 12?"}]
    ids = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode_prompt("Ann has 12?")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 0, 2)
