package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/function"
)

func peerCommand(stderr io.Writer) *cobra.Command {
	var cfg spirt.PeerConfig
	var verbose bool
	c := &cobra.Command{
		Use:   "peer [DIR]",
		Short: "Run one peer of a job",
		Long: "Peer runs one peer of the job in a folder until the job is finished. A peer that was killed\n" +
			"is started again with the same command: it goes on from its last checkpoint and catches up\n" +
			"with the others. Of the peers of a `spirt train`, --peer says which one.",
		Example: "  spirt peer home\n  spirt peer --run runs/mine --peer 3",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				cfg.Run = args[0]
			}
			if cfg.Run == "" {
				return usage(errors.New("peer needs the folder of a job; of a run of `spirt train` --run and --peer (see `spirt peer --help`)"))
			}
			if cfg.Peer == 0 {
				n, err := spirt.OwnPeer(cfg.Run)
				if err != nil {
					return err
				}
				cfg.Peer = n
			}
			return runPeer(c.Context(), stderr, verbose, cfg)
		},
	}
	c.Flags().StringVar(&cfg.Run, "run", "", "run folder")
	c.Flags().IntVar(&cfg.Peer, "peer", 0, "which peer of the run, from 1")
	c.Flags().StringVar(&cfg.Listen, "listen", "", "host:port to listen on; port 0 takes a free one (default as the peer was made, else 127.0.0.1:0)")
	c.Flags().StringVar(&cfg.Data, "data", "", "the peer's own data set, as idx:FOLDER (default as the peer was made)")
	c.Flags().StringVar(&cfg.Database, "db", "", "the peer's tensor database in another process: redis://, rediss:// or unix:// (default as the peer was made, else in its own)")
	c.Flags().BoolVar(&verbose, "verbose", false, "log every action of the round protocol")
	return c
}

func functionCommand(stderr io.Writer) *cobra.Command {
	c := &cobra.Command{
		Use:   "function",
		Short: "Run the gradient function as an instance, or serve a function to Lambda clients",
		Long: "Function is what a peer starts as an instance: with AWS_LAMBDA_RUNTIME_API set it polls\n" +
			"that runtime for invocations. docs/functions.md has the event and the result.",
		RunE: func(c *cobra.Command, _ []string) error {
			return usage(errors.New("AWS_LAMBDA_RUNTIME_API is not set: instances are started by a peer, by AWS Lambda or by `spirt function serve`"))
		},
	}
	serve := function.ServeConfig{Ready: func(at net.Addr) {
		fmt.Fprintf(stderr, "serving the Invoke API at http://%s; end with Ctrl-C\n", at)
	}}
	cfg := function.Config{Name: "gradient", Concurrency: 2, MemoryMB: 256, Timeout: time.Minute}
	s := &cobra.Command{
		Use:   "serve [-- COMMAND ...]",
		Short: "Serve a function on this machine through the AWS Lambda Invoke API",
		Long: "Serve runs a function (by default SPIRT's own gradient function) in a pool of instances and\n" +
			"answers the AWS Lambda Invoke API for it, so that the AWS CLI and SDKs work against it.",
		Example: "  spirt function serve --listen 127.0.0.1:9001 --name hello -- ./bootstrap\n" +
			"  aws lambda invoke --endpoint-url http://127.0.0.1:9001 --function-name hello out.json",
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			cfg.Command = args
			if len(args) == 0 {
				cfg.Command = []string{function.Self(), "function"}
				if t := os.Getenv("SPIRT_DB_TOKEN"); t != "" {
					cfg.Env = append(cfg.Env, "SPIRT_DB_TOKEN="+t)
				}
			}
			if cfg.Dir == "" && len(args) > 0 {
				var err error
				if cfg.Dir, err = os.Getwd(); err != nil {
					return err
				}
			}
			cfg.Isolation.Temp = true
			cfg.Logger = slog.New(slog.NewTextHandler(stderr, nil))
			return function.Serve(c.Context(), cfg, serve)
		},
	}
	s.Flags().StringVar(&serve.Listen, "listen", "127.0.0.1:9001", "host:port to listen on")
	s.Flags().BoolVar(&serve.Public, "public", false, "allow an address other than loopback: whoever reaches it can run the function")
	s.Flags().BoolVar(&cfg.Isolation.Off, "no-isolation", false, "let the function do all that you may do: read your files, connect anywhere")
	s.Flags().BoolVar(&cfg.Isolation.Network, "network", false, "let the function connect to other machines")
	s.Flags().StringArrayVar(&cfg.Isolation.Read, "read", nil, "a file or folder that the function may read, beside the working folder and the system's (repeatable)")
	s.Flags().StringArrayVar(&cfg.Isolation.Write, "write", nil, "a file or folder that the function may write to, beside its temporary folder (repeatable)")
	s.Flags().StringVar(&cfg.Name, "name", cfg.Name, "name of the function")
	s.Flags().IntVar(&cfg.Concurrency, "concurrency", cfg.Concurrency, "most instances at once")
	s.Flags().IntVar(&cfg.MemoryMB, "memory", cfg.MemoryMB, "memory of an instance in MiB")
	s.Flags().DurationVar(&cfg.Timeout, "timeout", cfg.Timeout, "time an invocation may take")
	c.AddCommand(s)
	return c
}

func evalCommand(stdout io.Writer) *cobra.Command {
	var dir, data string
	var asJSON bool
	c := &cobra.Command{
		Use:     "eval",
		Short:   "Evaluate the model of a run",
		Long:    "Eval prints the accuracy and the mean loss of a run's model on the job's test samples, or on\nall samples of another data set.",
		Example: "  spirt eval --run runs/mine\n  spirt eval --run runs/mine --data idx:~/t10k --json",
		RunE: func(c *cobra.Command, _ []string) error {
			if dir == "" {
				return usage(errors.New("eval needs --run with a run folder (see `spirt eval --help`)"))
			}
			e, err := spirt.Eval(dir, data)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(e)
			}
			_, err = fmt.Fprintf(stdout, "accuracy %.2f %%, loss %.4f on %d samples, model %.12s\n", 100**e.Accuracy, *e.Loss, e.Samples, e.Model)
			return err
		},
	}
	c.Flags().StringVar(&dir, "run", "", "run folder")
	c.Flags().StringVar(&data, "data", "", "data set to evaluate on, as idx:FOLDER (default the test samples of the job)")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object")
	return c
}

func versionCommand(stdout io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(stdout, "spirt", spirt.Version())
			return err
		},
	}
}

// isUnknownCommand tells cobra's error for a command that does not exist,
// which has no type.
func isUnknownCommand(err error) bool { return strings.HasPrefix(err.Error(), "unknown command") }
