"""A multiprocessing queue, its feeder thread, its semaphores and its worker survive."""
import multiprocessing


def echo(questions, answers):
    while True:
        value = questions.get()
        answers.put((value, value * 2))


def setup():
    context = multiprocessing.get_context("fork")
    questions, answers = context.Queue(), context.Queue()
    worker = context.Process(target=echo, args=(questions, answers), daemon=True)
    worker.start()
    questions.put(1)
    assert answers.get(timeout=10) == (1, 2)
    questions.put(2)
    return questions, answers, worker


def check(state):
    questions, answers, worker = state
    assert answers.get(timeout=10) == (2, 4)
    questions.put("x")
    assert answers.get(timeout=10) == ("x", "xx")
    assert worker.is_alive()
    worker.kill()
    worker.join(10)
