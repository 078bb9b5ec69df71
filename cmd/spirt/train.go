package main

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
)

func trainCommand(stdout, stderr io.Writer) *cobra.Command {
	job := spirt.DefaultJob()
	job.Byzantine, job.Cooldown = 0, 0 // follow from --peers and --rounds
	target := "off"
	var cfg spirt.TrainConfig
	var asJSON bool
	var watched metricsFlags
	c := &cobra.Command{
		Use:   "train",
		Short: "Train a model with several peers on this machine",
		Long: "Train starts one process for each peer, each with its own identity, tensor database and\n" +
			"function instances, and watches them. It coordinates nothing: the peers agree among\n" +
			"themselves and finish also when this command is killed.\n\n" +
			"The run folder keeps the job, the events, the model and a folder for each peer.",
		Example: "  spirt train\n" +
			"  spirt train --functions database\n" +
			"  spirt train --db redis://127.0.0.1:6379\n" +
			"  spirt train --model cnn --optimizer sgd --lr 0.05 --rounds 800\n" +
			"  spirt train --data idx:~/fashion-mnist --target-accuracy 0.9 --run runs/fashion\n" +
			"  spirt train --json | jq 'select(.event==\"validation\")'",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := setTarget(&job, target); err != nil {
				return usage(err)
			}
			if err := requirePositive(c, "peers", "rounds", "batch-size", "batches-per-round", "lr"); err != nil {
				return usage(err)
			}
			if cfg.Dir == "" {
				cfg.Dir = filepath.Join("runs", time.Now().Format("20060102-150405")+"-"+job.Model)
			}
			p := newProgress(stderr, job, cfg.Dir)
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
				stop, err := watched.train(&cfg, p.say)
				if err != nil {
					return usage(err)
				}
				defer stop()
			}
			done, err := spirt.Train(ctx, job, cfg)
			p.close()
			if done.Event != "" { // it was started, whatever came of it
				if cerr := spirt.WriteCurves(cfg.Dir); cerr != nil {
					p.say("the curves could not be drawn: %v", cerr)
				}
			}
			if cause := context.Cause(ctx); err != nil && c.Context().Err() == nil && cause != nil {
				return cause
			} else if err != nil {
				return err
			}
			p.summary(done)
			return nil
		},
	}
	jobFlags(c, &job, &target)
	f := c.Flags()
	f.StringVar(&cfg.Dir, "run", "", "run folder, which must not exist (default runs/<time>-<model>)")
	f.StringVar(&cfg.Listen, "listen", "", "host:port of peer 1; peer n takes the port n-1 above (default loopback, free ports)")
	f.StringSliceVar(&cfg.Databases, "db", nil, "tensor databases in other processes, redis://[user:password@]host:port, rediss:// or unix:///path: one for each peer, or one for all (default in each peer's own process)")
	watched.add(f)
	f.BoolVar(&cfg.Verbose, "verbose", false, "have the peers log every action of the round protocol")
	f.BoolVar(&asJSON, "json", false, "write events to standard output, one JSON object a line")
	return c
}

// jobFlags are those that say what is trained.
func jobFlags(c *cobra.Command, job *spirt.Job, target *string) {
	f := c.Flags()
	f.IntVar(&job.Peers, "peers", job.Peers, "number of peers, 1 to 64")
	f.StringVar(&job.Model, "model", job.Model, "model: lenet5, cnn, mlp or logistic")
	f.StringVar(&job.Data, "data", job.Data, "data set: mnist-10k, or idx:FOLDER with IDX files")
	f.StringVar(&job.Optimizer, "optimizer", job.Optimizer, "optimizer: adam, or sgd with momentum 0.9")
	f.Float32Var(&job.LearningRate, "lr", job.LearningRate, "learning rate")
	f.IntVar(&job.BatchSize, "batch-size", job.BatchSize, "samples in a minibatch")
	f.IntVar(&job.BatchesPerRound, "batches-per-round", job.BatchesPerRound, "minibatches that each peer averages in a round")
	f.IntVar(&job.Rounds, "rounds", job.Rounds, "rounds to train")
	f.IntVar(&job.Cooldown, "cooldown", 0, "last rounds in which the learning rate falls to zero (default half of them; -1 for none)")
	f.StringVar(target, "target-accuracy", *target, "stop at this validation accuracy, a fraction such as 0.97, or off")
	f.StringVar(&job.Shards, "shards", job.Shards, "training samples of a peer: dealt anew in each epoch, or fixed, as with private data")
	f.IntVar(&job.PauseAfter, "pause-after", job.PauseAfter, "wait, so many rounds after the last final checkpoint, until a quorum is connected (0: train on)")
	f.StringVar(&job.Functions.Kind, "functions", "processes", "what computes gradients: processes, which are function instances, or the database itself")
	f.StringVar(&job.Codec, "codec", job.Codec, "averages travel as float32, or as float16 in half the bytes")
	f.Uint64Var(&job.Seed, "seed", job.Seed, "fixes the initial parameters and the order of the data")
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
