package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt/dashboard"
)

func dashboardCommand(stdout, stderr io.Writer) *cobra.Command {
	var listen, tokenFile, tokenEnv string
	var asJSON bool
	c := &cobra.Command{
		Use:   "dashboard RUN...",
		Short: "Show runs in a browser",
		Long: "Dashboard serves a page with the curves, peers, steps, functions, faults and cost of runs, live\n" +
			"or when they are over; several are laid over each other. A folder that holds runs offers all of\n" +
			"them. It answers on this machine only, unless a token is given. docs/dashboard.md has more.",
		Example: "  spirt dashboard runs/mine\n  spirt dashboard runs --listen 127.0.0.1:8080\n  spirt dashboard runs --listen 0.0.0.0:8080 --token-file token",
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{"runs"}
			}
			token, err := readToken(tokenFile, tokenEnv)
			if err != nil {
				return usage(err)
			}
			s, err := dashboard.New(dashboard.Config{Runs: args, Token: token})
			if err != nil {
				return usage(err)
			}
			l, err := s.Listen(listen)
			if err != nil {
				return usage(err)
			}
			url := dashboardURL(l)
			if asJSON {
				if err := json.NewEncoder(stdout).Encode(map[string]string{"url": url}); err != nil {
					return err
				}
			}
			fmt.Fprintf(stderr, "dashboard at %s; end with Ctrl-C\n", url)
			return s.Serve(c.Context(), l)
		},
	}
	c.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "host:port to listen on; port 0 takes a free one")
	c.Flags().StringVar(&tokenFile, "token-file", "", "file with the token that visitors must know; needed for addresses that others reach")
	c.Flags().StringVar(&tokenEnv, "token-env", "", "environment variable with that token")
	c.Flags().BoolVar(&asJSON, "json", false, "write the URL as a JSON object to standard output")
	return c
}

func dashboardURL(l net.Listener) string { return "http://" + l.Addr().String() + "/" }

// readToken takes a token from a file or a variable; empty if neither is named.
func readToken(file, env string) (string, error) {
	switch {
	case file != "" && env != "":
		return "", errors.New("--token-file and --token-env: give one of them")
	case env != "":
		t := strings.TrimSpace(os.Getenv(env))
		if t == "" {
			return "", fmt.Errorf("--token-env %s: the variable is not set", env)
		}
		return t, nil
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("the token: %w", err)
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, 4<<10))
		t := strings.TrimSpace(string(b))
		if err == nil && t == "" {
			err = fmt.Errorf("%s is empty", file)
		}
		return t, err
	}
	return "", nil
}

// dashboardOf serves one run while it is trained. What is wrong with it is
// said, and ends nothing.
func dashboardOf(ctx context.Context, dir, listen string, say func(format string, args ...any)) (stop func()) {
	s, err := dashboard.New(dashboard.Config{Runs: []string{dir}})
	var l net.Listener
	if err == nil {
		l, err = s.Listen(listen)
	}
	if err != nil {
		say("no dashboard: %v", err)
		return func() {}
	}
	say("dashboard at %s", dashboardURL(l))
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { // ends with stop
		defer close(ended)
		if err := s.Serve(ctx, l); err != nil {
			say("the dashboard has ended: %v", err)
		}
	}()
	return func() { cancel(); <-ended }
}
