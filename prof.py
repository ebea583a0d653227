import cProfile,pstats,sys,time
t=time.process_time()
from hvdlm.cli import main
from hvdlm.training import run
print("imports",time.process_time()-t,file=sys.stderr)
p=cProfile.Profile()
o=run.start_rank
def sr(*a):
    t=time.process_time()
    p.enable(); r=o(*a); p.disable()
    print("start_rank",time.process_time()-t,file=sys.stderr)
    return r
run.start_rank=sr
import shutil; shutil.rmtree('/work/tmp/prun',ignore_errors=True)
main(['train','/work/tmp/small.toml','--data.path','/work/data/cmp','--train.run_dir','/work/tmp/prun','--train.steps','3','--optimizer.warmup_steps','0'])
pstats.Stats(p).sort_stats('cumtime').print_stats(35)
