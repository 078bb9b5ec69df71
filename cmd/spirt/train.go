package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/spirt-ml/spirt"
)

func trainCommand(stdout, stderr io.Writer) *cobra.Command {
	var cfg spirt.TrainConfig
	var flags jobFlags
	var asJSON, plainLines, quiet bool
	var watched metricsFlags
	var tensorBoard bool
	resume, board := "", ""
	c := &cobra.Command{
		Use:   "train [JOB.yaml]",
		Args:  cobra.MaximumNArgs(1),
		Short: "Train a model with several peers on this machine",
		Long: "Train starts one process for each peer, each with its own identity, tensor database and\n" +
			"function instances, and watches them. It coordinates nothing: the peers agree among\n" +
			"themselves and finish also when this command is killed.\n\n" +
			"A job file, which `spirt init` writes, says what is trained; flags go before what stands in it.\n" +
			"The run folder keeps the job, the events, the model and a folder for each peer.\n\n" +
			"Ctrl-C has the peers leave a checkpoint and stop; a second one ends them at once. --resume goes\n" +
			"on with a run that was interrupted or killed, and leaves one that is done as it is. A run that ends by --max-time or --budget-usd exits\n" +
			"with 3, its model is as good as it got.",
		Example: "  spirt train\n" +
			"  spirt train job.yaml --rounds 1000\n" +
			"  spirt train --functions database\n" +
			"  spirt train --db redis://127.0.0.1:6379\n" +
			"  spirt train --model cnn --optimizer sgd --lr 0.05 --rounds 800\n" +
			"  spirt train --data idx:~/fashion-mnist --target-accuracy 0.9 --run runs/fashion\n" +
			"  spirt train --patience 5 --min-delta 0.001 --max-time 30m --budget-usd 0.50\n" +
			"  spirt train --resume runs/fashion\n" +
			"  spirt train --json | jq 'select(.event==\"validation\")'",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				flags.file = args[0]
			}
			job, err := flags.job(c)
			if err != nil {
				return usage(err)
			}
			over := false // what is resumed
			if resume != "" {
				if job, over, err = toResume(c, &flags, resume); err != nil {
					return err
				}
				cfg.Dir = resume
			}
			if cfg.Dir == "" {
				cfg.Dir = filepath.Join("runs", time.Now().Format("20060102-150405")+"-"+job.Model)
			}
			p := &progress{w: stderr, job: job, dir: cfg.Dir, quiet: quiet, plain: plainLines || asJSON && isTerminal(stdout)}
			if resume != "" { // what was before is not told again
				if v, err := spirt.ViewOf(resume); err == nil {
					p.view = *v
				}
			}
			// Who reads the events may leave, as head does. Nobody then
			// waits for the run, and the peers are stopped.
			signal.Ignore(syscall.SIGPIPE)
			ctx, cancel := context.WithCancelCause(c.Context())
			defer cancel(nil)
			cfg.OnEvent = func(e spirt.Event, line []byte) {
				if asJSON {
					if _, err := stdout.Write(line); err != nil {
						cancel(fmt.Errorf("the events could not be written, the run was stopped: %w", err))
					}
				}
				p.event(e)
			}
			if watched.at != "" {
				stop, err := watched.train(&cfg, resume != "", p.say)
				if err != nil {
					return usage(err)
				}
				defer stop()
			}
			if board != "" {
				// Once the folder is there: the first event says so.
				next, stop := cfg.OnEvent, func() {}
				var once sync.Once
				cfg.OnEvent = func(e spirt.Event, line []byte) {
					once.Do(func() { stop = dashboardOf(c.Context(), cfg.Dir, board, p.say) })
					next(e, line)
				}
				defer func() { stop() }()
			}
			if tensorBoard {
				defer trainTensorBoard(&cfg, p.say)()
			}
			defer trainTraces(&cfg, p.say)()
			kill, calm := secondSignal()
			defer calm()
			cfg.Kill = kill
			defer context.AfterFunc(ctx, p.stopping)()
			var done spirt.Event
			if resume != "" {
				done, err = spirt.Resume(ctx, cfg)
			} else {
				done, err = spirt.Train(ctx, job, cfg)
			}
			p.close()
			if over && err == nil && asJSON {
				err = json.NewEncoder(stdout).Encode(done)
			}
			if done.Event != "" && !over { // it was started, whatever came of it
				if cerr := spirt.WriteCurves(cfg.Dir); cerr != nil {
					p.say("the curves could not be drawn: %v", cerr)
				}
			}
			if cause := context.Cause(ctx); err != nil && c.Context().Err() == nil && cause != nil {
				return cause
			} else if err != nil {
				return flags.explain(err)
			}
			p.summary(done)
			if !over && (done.StopReason == "time" || done.StopReason == "money") {
				return errBudget
			}
			return nil
		},
	}
	flags.add(c)
	f := c.Flags()
	f.StringVar(&resume, "resume", "", "go on with the run in this folder; of the other flags only --json, --verbose and those of the view count")
	f.StringVar(&board, "dashboard", "", "serve the run's dashboard while it goes on, at host:port of this machine or, without a value, at a free port (docs/dashboard.md)")
	f.Lookup("dashboard").NoOptDefVal = "127.0.0.1:0"
	f.StringVar(&cfg.Prices, "prices", "", "table of prices, by which the run is billed: a name that `spirt prices` lists, or a file (default that of AWS Lambda, arm64)")
	f.StringVar(&cfg.Dir, "run", "", "run folder, which must not exist (default runs/<time>-<model>)")
	f.StringVar(&cfg.Listen, "listen", "", "host:port of peer 1; peer n takes the port n-1 above (default loopback, free ports)")
	f.StringSliceVar(&cfg.Databases, "db", nil, "tensor databases in other processes, redis://[user:password@]host:port, rediss:// or unix:///path: one for each peer, or one for all (default in each peer's own process)")
	watched.add(f)
	f.BoolVar(&tensorBoard, "tensorboard", false, "write event files for TensorBoard into the run folder, while it trains")
	f.BoolVar(&cfg.Verbose, "verbose", false, "have the peers log every action of the round protocol")
	f.BoolVar(&quiet, "quiet", false, "show nothing but the summary")
	f.BoolVar(&plainLines, "plain", false, "show lines, not a picture, also on a terminal")
	f.BoolVar(&asJSON, "json", false, "write events to standard output, one JSON object a line")
	return c
}

// errBudget says that a run ended because a budget was reached: it is done, and
// has said so.
var errBudget = errors.New("a budget was reached")

// toResume returns the job of a run that is to go on, and whether it is done.
func toResume(c *cobra.Command, flags *jobFlags, dir string) (job spirt.Job, over bool, err error) {
	var given []string
	c.Flags().Visit(func(f *pflag.Flag) {
		if flags.set.Lookup(f.Name) != nil || f.Name == "run" || f.Name == "db" || f.Name == "listen" || f.Name == "prices" {
			given = append(given, "--"+f.Name)
		}
	})
	if len(given) > 0 || c.Flags().NArg() > 0 {
		return job, false, usage(fmt.Errorf("a run that is resumed keeps its job: leave out %s, or start another run", strings.Join(append(given, c.Flags().Args()...), ", ")))
	}
	info, err := spirt.ReadRun(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return job, false, usage(fmt.Errorf("%s is no run folder: `spirt runs` lists those there are", dir))
	}
	return info.Job, info.State == "done" && info.Done != nil, err
}

// secondSignal returns a channel that is closed at the second signal to end
// this process, until calm is called. The first ends the context.
func secondSignal() (second <-chan struct{}, calm func()) {
	got, kill, over := make(chan os.Signal, 2), make(chan struct{}), make(chan struct{})
	signal.Notify(got, os.Interrupt, syscall.SIGTERM)
	go func() { // ends with calm
		for n := 0; ; n++ {
			select {
			case <-over:
				return
			case <-got:
			}
			if n == 1 {
				close(kill)
			}
		}
	}()
	return kill, func() { signal.Stop(got); close(over) }
}

// jobFlags are the flags that say what is trained, and the file that says it
// where they do not.
type jobFlags struct {
	file   string
	flags  spirt.Job
	target string
	set    *pflag.FlagSet
	read   *spirt.JobFile // nil: there is no file
}

// add adds the flags to a command.
func (j *jobFlags) add(c *cobra.Command) {
	j.flags, j.target = spirt.DefaultJob(), "off"
	j.flags.Byzantine, j.flags.Cooldown = 0, 0 // follow from --peers and --rounds
	f := pflag.NewFlagSet("job", pflag.ContinueOnError)
	f.IntVar(&j.flags.Peers, "peers", j.flags.Peers, "number of peers, 1 to 64")
	f.StringVar(&j.flags.Model, "model", j.flags.Model, "model: lenet5, cnn, mlp or logistic")
	f.StringVar(&j.flags.Data, "data", j.flags.Data, "data set: mnist-10k, or idx:FOLDER with IDX files")
	f.StringVar(&j.flags.Optimizer, "optimizer", j.flags.Optimizer, "optimizer: adam, or sgd with momentum 0.9")
	f.Float32Var(&j.flags.LearningRate, "lr", j.flags.LearningRate, "learning rate")
	f.IntVar(&j.flags.BatchSize, "batch-size", j.flags.BatchSize, "samples in a minibatch")
	f.IntVar(&j.flags.BatchesPerRound, "batches-per-round", j.flags.BatchesPerRound, "minibatches that each peer averages in a round")
	f.IntVar(&j.flags.Rounds, "rounds", j.flags.Rounds, "rounds to train")
	f.IntVar(&j.flags.Cooldown, "cooldown", 0, "last rounds in which the learning rate falls to zero (default half of them; -1 for none)")
	f.StringVar(&j.target, "target-accuracy", j.target, "stop at this validation accuracy, a fraction such as 0.97, or off")
	f.IntVar(&j.flags.Patience, "patience", 0, "stop when so many validations in a row brought no improvement (0: do not)")
	f.Float64Var(&j.flags.MinDelta, "min-delta", 0, "by how much the validation loss must fall to count as an improvement")
	f.DurationVar(&j.flags.MaxTime, "max-time", 0, "stop when the run has gone on for so long, such as 30m (0: no limit)")
	f.Float64Var(&j.flags.BudgetUSD, "budget-usd", 0, "stop before the run has cost more than so many US dollars by its prices (0: no limit)")
	f.StringVar(&j.flags.Shards, "shards", j.flags.Shards, "training samples of a peer: dealt anew in each epoch, or fixed, as with private data")
	f.IntVar(&j.flags.PauseAfter, "pause-after", j.flags.PauseAfter, "wait, so many rounds after the last final checkpoint, until a quorum is connected (0: train on)")
	f.StringVar(&j.flags.Functions.Kind, "functions", "processes", "what computes gradients: processes, which are function instances, or the database itself")
	f.StringVar(&j.flags.Codec, "codec", j.flags.Codec, "averages travel as float32, or as float16 in half the bytes")
	f.Uint64Var(&j.flags.Seed, "seed", j.flags.Seed, "fixes the initial parameters and the order of the data")
	j.set = f
	c.Flags().AddFlagSet(f)
}

// job returns the job that the file and the flags say, which go before it.
func (j *jobFlags) job(c *cobra.Command) (spirt.Job, error) {
	if err := requirePositive(c, "peers", "rounds", "batch-size", "batches-per-round", "lr"); err != nil {
		return spirt.Job{}, err
	}
	if j.file != "" {
		read, err := spirt.ReadJobFile(j.file)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("the job file: %w: `spirt init %s` writes one", err, j.file)
		}
		if err != nil {
			return spirt.Job{}, err
		}
		given := map[*pflag.Flag]string{}
		j.set.VisitAll(func(f *pflag.Flag) {
			if f.Changed {
				given[f] = f.Value.String()
			}
		})
		j.read, j.flags = read, read.Job
		for f, text := range given { // again, since the file's are there now
			if err := f.Value.Set(text); err != nil {
				return spirt.Job{}, fmt.Errorf("--%s %s: %w", f.Name, text, err)
			}
		}
	}
	if j.read == nil || j.set.Changed("target-accuracy") {
		if err := setTarget(&j.flags, j.target); err != nil {
			return spirt.Job{}, err
		}
	}
	job := j.flags
	if err := job.Resolve(); err != nil {
		return spirt.Job{}, j.explain(err)
	}
	return job, nil
}

// explain says whether an error about a field of the job is about a flag, or
// where in the file it is.
func (j *jobFlags) explain(err error) error {
	field := spirt.FieldOf(err)
	if field == "" {
		return err
	}
	changed := false
	j.set.VisitAll(func(f *pflag.Flag) { changed = changed || f.Changed && fieldOfFlag(f.Name) == field })
	if changed {
		_, says, _ := strings.Cut(err.Error(), ": ")
		text := fmt.Errorf("--%s: %s%s", flagOfField(field), says, j.flags.MeantBy(field))
		var wrong *spirt.UsageError
		if errors.As(err, &wrong) {
			return usage(text)
		}
		return text
	}
	if j.read != nil {
		var wrong *spirt.UsageError
		located := j.read.Locate(err)
		if errors.As(err, &wrong) {
			return usage(located)
		}
		return located
	}
	return err
}

// fieldOfFlag returns the field of a job that a flag sets.
func fieldOfFlag(flag string) string {
	if flag == "functions" {
		return "functions.kind"
	}
	return strings.ReplaceAll(flag, "-", "_")
}

func flagOfField(field string) string {
	if field == "functions.kind" {
		return "functions"
	}
	return strings.ReplaceAll(field, "_", "-")
}

// requirePositive refuses a flag that was set to zero: in a job zero would
// mean the default.
func requirePositive(c *cobra.Command, names ...string) error {
	for _, name := range names {
		f := c.Flags().Lookup(name)
		if v, err := strconv.ParseFloat(f.Value.String(), 64); f.Changed && (err != nil || !(v > 0)) {
			return fmt.Errorf("--%s %s is not positive (see `%s --help`)", name, f.Value, c.CommandPath())
		}
	}
	return nil
}

func setTarget(job *spirt.Job, target string) error {
	if target == "off" {
		job.TargetAccuracy = 0
		return nil
	}
	v, err := strconv.ParseFloat(target, 64)
	if err != nil || !(v > 0 && v <= 1) {
		return fmt.Errorf("--target-accuracy %s: take a fraction above 0 and up to 1, such as 0.97, or off", target)
	}
	job.TargetAccuracy = v
	return nil
}
