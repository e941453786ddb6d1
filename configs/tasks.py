"""Tasks on real data, small enough for two CPU cores: what to fine-tune or train, and how to begin.

    configs/tasks.py:topics    also masked, sentiment, translation, summarisation, answering,
                               dialogue, multitask

Four layers of width 128 (two and two with a decoder), matrices by Muon, the rest by Adam; 1.3M to
1.7M parameters. docs/tasks.md has naive baselines, and what short runs reach beside them. Larger
models are a flag away (`--config.model.num_layers=12 --config.model.embed_dim=768`), and so are
pretrained ones: with `--config.init.from=RUN` the sizes, the tokenizer and the vocabulary are to be
those of that run.

Every task reads a store of two fields, `source` and `target`; scripts/predict.py evaluates it on
records that training never saw. scripts/split_records.py splits them by the hash of a key, so that
records of one text, paragraph or file stay together:

    python scripts/split_records.py --data=DATA --field=source=SOURCE --field=target=TARGET \\
        --key=source --out=data/TASK
    python scripts/train_tokenizer.py --data=data/TASK/train.jsonl --piece-span=word \\
        --field='text={source} {target}' --vocab-size=4096 --out=data/TASK/tokenizer.model
    python scripts/prepare_data.py --data=data/TASK/train.jsonl --field=source --field=target \\
        --tokenizer=data/TASK/tokenizer.model --out=data/TASK
    python scripts/train.py --config=configs/tasks.py:TASK --workdir=runs/TASK
    python scripts/predict.py --workdir=runs/TASK --data=data/TASK/test.jsonl \\
        --train=data/TASK/train.jsonl --metrics=METRICS

where the folder D is ../shared/data/text, 6,144 pieces are for Chinese, and any other jsonl, table
or TFDS has its own columns:

    TASK           DATA                     SOURCE                    TARGET      METRICS
    translation    D/tatoeba-cmn-eng/cmn.txt  {1}                     {2}         bleu
    summarisation  'D/csl/ts_*.tsv'         {2}                       {3}         rouge
    answering      D/xquad/xquad.en.json    'question: {question} text: {context}'  answer  answers
                   --format=squad, without --key
    dialogue       D/gsm8k/test.jsonl       'user: {question}\\nassistant:'  answer  bleu
    topics         stdlib                   text                      package     classes
                   --format=packages, without --key, --test-fraction=0.25, a --label for each class
    sentiment      REVIEWS.jsonl            text                      label       classes
                   labels "negative" and "positive", or --config.objective.labels

masked pretrains an encoder on the source of the standard library; topics starts from it by
`--config.init.from=runs/masked`, and without it at random. dialogue answers in
`scripts/generate.py --chat`, whose lines its template has. multitask has three tasks in one model;
its stores are those of the tasks, made with one tokenizer, the task's name before each source.
"""

from lm.config.conversion import default, task

# model, objective, vocabulary, tokens of a row, of the encoder's, rows in a batch, steps
TASKS = {
    "masked": ("encoder", "mlm", 4096, 256, None, 16, 1000),
    "topics": ("encoder", "classification", 4096, 512, None, 8, 300),
    "sentiment": ("encoder", "classification", 4096, 512, None, 8, 1000),
    "translation": ("encoder_decoder", "seq2seq", 6144, 256, 256, 8, 800),
    "summarisation": ("encoder_decoder", "seq2seq", 6144, 64, 512, 16, 500),
    "answering": ("encoder_decoder", "seq2seq", 4096, 64, 512, 16, 500),
    "dialogue": ("encoder_decoder", "seq2seq", 4096, 256, 256, 16, 500),
    "multitask": ("encoder_decoder", "multitask", 6144, 128, 512, 12, 600),
}
PACKAGES = (
    "asyncio", "distutils", "email", "idlelib", "importlib", "lib2to3", "multiprocessing",
    "tkinter", "urllib", "xml",
)  # fmt: skip


def get_config(arg=None):
    name = arg or "topics"
    if name not in TASKS:
        raise ValueError(f"configs/tasks.py:{name} is not a task; there are: {', '.join(TASKS)}")
    model_name, objective, vocab, length, encoder_length, batch_size, num_steps = TASKS[name]
    config = default(model=model_name, objective=objective)

    model = config.model
    model.vocab_size = vocab + 8  # the mask token is one that the tokenizer does not use
    model.max_length = 512
    model.num_layers = 2 if encoder_length else 4
    model.embed_dim = 128
    model.num_heads = 4
    model.activation = "relu2"
    model.qk_norm = True
    model.scan_unroll = -1
    model.dropout = 0.0 if name == "masked" else 0.1
    if not encoder_length:
        model.num_types = 0

    data = config.data
    folder = {"masked": "stdlib", "multitask": "multitask/translation"}.get(name, name)
    data.tokenizer = f"data/{folder}/tokenizer.model"
    data.train = (f"data/{folder}/train",)
    data.validation = (f"data/{folder}/validation",)
    data.length = length
    data.encoder_length = encoder_length
    data.batch_size = batch_size
    config.loader.kind = "thread"
    data.too_long = "error" if name == "masked" else "cut"

    if name == "topics":  # starts from the run `masked`, with its tokenizer
        data.tokenizer = "data/stdlib/tokenizer.model"
        config.objective.labels = PACKAGES
        config.objective.verbalizers = tuple("ABCDEFGHIJ")
    if name == "sentiment":
        config.objective.labels = ("negative", "positive")
        config.objective.verbalizers = ("A", "B")
    if name == "multitask":
        names = ("classification", "summarisation", "translation")
        data.tokenizer = "data/multitask/tokenizer.model"
        data.train = tuple(f"data/multitask/{n}/train" for n in names)
        data.validation = tuple(f"data/multitask/{n}/validation" for n in names)
        config.objective.tasks = {
            n: task("seq2seq", (f"data/multitask/{n}/train", f"data/multitask/{n}/validation"))
            for n in names
        }

    config.loss.chunk_size = 512

    optimizer = config.optimizer
    optimizer.name = "muon"
    optimizer.learning_rate = 3e-3
    optimizer.muon_learning_rate = 2e-2
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0
    optimizer.schedule.kind = "linear"
    optimizer.schedule.warmup_steps = 20
    optimizer.schedule.final_fraction = 0.02

    config.train.num_steps = num_steps
    config.train.eval_every = 200
    config.train.eval_batches = 20
    config.checkpoint.every = 200
    return config
