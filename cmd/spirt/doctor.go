package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
)

func doctorCommand(stdout io.Writer) *cobra.Command {
	var cfg spirt.DoctorConfig
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether this host can train",
		Long: "Doctor looks at processor, memory, disk, limits, clock and isolation, tries the folder, sockets\n" +
			"and a meeting of two peers, and trains one peer for two rounds in a folder that it removes again.\n" +
			"It says what each finding means and how to mend it, and exits with 1 if there is a problem.",
		Example: "  spirt doctor\n  spirt doctor --dir /data --db redis://127.0.0.1:6379\n  spirt doctor --peer 192.168.1.20:7000",
		RunE: func(c *cobra.Command, _ []string) error {
			problems := 0
			var failed error
			spirt.Doctor(c.Context(), cfg, func(f spirt.Finding) {
				if f.State == spirt.FindingProblem {
					problems++
				}
				if asJSON {
					failed = errors.Join(failed, json.NewEncoder(stdout).Encode(f))
					return
				}
				_, err := fmt.Fprintf(stdout, "%-8s %-11s %s\n", f.State, f.Check, clean(f.Found))
				if f.Mend != "" && err == nil {
					_, err = fmt.Fprintf(stdout, "%20s %s\n", "", f.Mend)
				}
				failed = errors.Join(failed, err)
			})
			if c.Context().Err() != nil {
				return spirt.ErrInterrupted
			}
			switch {
			case problems == 1:
				failed = errors.Join(failed, errors.New("a problem: see above how to mend it"))
			case problems > 1:
				failed = errors.Join(failed, fmt.Errorf("%d problems: see above how to mend them", problems))
			}
			return failed
		},
	}
	c.Flags().StringVar(&cfg.Dir, "dir", ".", "folder in which runs are to lie")
	c.Flags().StringVar(&cfg.Database, "db", "", "a tensor database in another process: redis://, rediss:// or unix://")
	c.Flags().StringVar(&cfg.Peer, "peer", "", "host:port of a peer on another machine")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object for each finding")
	return c
}
