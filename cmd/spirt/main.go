// Command spirt trains machine-learning models serverless and peer to peer.
//
// Start with `spirt train`; `spirt help` lists the commands. A command exits
// with 0 when it is done, 1 when it failed, 2 for bad usage or a bad job, 3
// when a budget was reached and 130 when it was interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/function/gradient"
)

func main() {
	// An instance starts often: it does not wait for flags to be parsed.
	if len(os.Args) == 2 && os.Args[1] == "function" && os.Getenv("AWS_LAMBDA_RUNTIME_API") != "" {
		os.Exit(gradient.Main())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // the second Ctrl-C ends this process at once
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// usage marks an error as one of how the command was called.
func usage(err error) error { return &spirt.UsageError{Err: err} }

// run runs one command and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "spirt",
		Short:         "Train models serverless and peer to peer",
		Long:          "SPIRT trains a model with peers that need no server and no leader: each has its own\nfunctions, which compute gradients, and its own database, which averages and updates.",
		Example:       "  spirt train                       # LeNet-5 on handwritten digits, four peers\n  spirt train --peers 8 --rounds 1000 --json\n  spirt eval --run runs/mine        # accuracy on the test images\n  spirt join spirt1...              # take part in a job of others",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w (see `%s --help`)", err, c.CommandPath()))
	})
	root.AddCommand(initCommand(stdout), trainCommand(stdout, stderr), jobCommand(stdout), inviteCommand(stdout), joinCommand(stderr), peerCommand(stderr),
		peersCommand(stdout), expelCommand(stdout), leaveCommand(stdout, stderr), rotateKeyCommand(stdout, stderr), rosterCommand(stdout),
		functionCommand(stderr), dbCommand(stdout, stderr), evalCommand(stdout), doctorCommand(stdout), predictCommand(stdout), runsCommand(stdout), compareCommand(stdout), dashboardCommand(stdout, stderr), statusCommand(stdout), stopCommand(stdout), logsCommand(stdout), metricsCommand(stdout, stderr), exportCommand(stdout), billCommand(stdout), planCommand(stdout, stderr), pricesCommand(stdout), simulateCommand(stdout, stderr), versionCommand(stdout))
	for _, c := range root.Commands() {
		if c.Args == nil {
			c.Args = func(c *cobra.Command, args []string) error {
				if len(args) > 0 {
					return usage(fmt.Errorf("%s takes no argument %q (see `%s --help`)", c.CommandPath(), args[0], c.CommandPath()))
				}
				return nil
			}
		}
	}
	_, err := root.ExecuteContextC(ctx)
	return report(stderr, err)
}

// besides returns what else went wrong when something was interrupted, such as
// a last checkpoint that a full disk did not take.
func besides(err error) (others []error) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		if errors.Is(err, spirt.ErrInterrupted) || errors.Is(err, context.Canceled) {
			return nil
		}
		return []error{err}
	}
	for _, e := range joined.Unwrap() {
		others = append(others, besides(e)...)
	}
	return others
}

// report prints an error and returns the exit code that stands for it.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return spirt.ExitDone
	}
	var wrong *spirt.UsageError
	switch {
	case errors.Is(err, errBudget):
		return spirt.ExitBudget
	case errors.Is(err, spirt.ErrInterrupted), errors.Is(err, context.Canceled):
		fmt.Fprintln(stderr, "spirt: interrupted")
		for _, e := range besides(err) {
			fmt.Fprintln(stderr, "spirt:", e)
		}
		return spirt.ExitInterrupted
	case errors.As(err, &wrong), isUnknownCommand(err):
		fmt.Fprintln(stderr, "spirt:", err)
		return spirt.ExitUsage
	}
	fmt.Fprintln(stderr, "spirt:", err)
	return spirt.ExitFailed
}
