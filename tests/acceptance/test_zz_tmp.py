
from tests.support.processes import WorkerProcess
def test_x(env, tmp_path):
    bare = {n: v for n, v in env.items() if n != "STOKER_ENGINE__URL"} | {"STOKER_ENGINE__KIND": "none"}
    try:
        with WorkerProcess("bare", env=bare, folder=tmp_path, ready_s=6):
            pass
    except BaseException as e:
        print("ERR", e)
    import glob
    print(open(glob.glob(str(tmp_path/"bare*.log"))[0]).read()[-1500:])
