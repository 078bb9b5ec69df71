package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
)

func initCommand(stdout io.Writer) *cobra.Command {
	var force, schema bool
	c := &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a job file with every field explained",
		Long: "Init writes a job file, by default job.yaml, that says what `spirt train` does when it is told\n" +
			"nothing: every field with its default, what it takes and what it does. Change it and run\n" +
			"`spirt train FILE`. With - it goes to standard output. docs/job.md is the reference.",
		Example: "  spirt init\n  spirt init - | less\n  spirt init --schema > job.schema.json   # for editors",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			path := "job.yaml"
			if len(args) == 1 {
				path = args[0]
			}
			if schema {
				if len(args) == 1 || force {
					return usage(errors.New("--schema writes to standard output: it takes no file and no --force"))
				}
				_, err := io.WriteString(stdout, spirt.JobSchema())
				return err
			}
			if path == "-" {
				_, err := io.WriteString(stdout, spirt.DefaultJobFile())
				return err
			}
			mode := os.O_WRONLY | os.O_CREATE | os.O_EXCL
			if force {
				mode = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
			}
			f, err := os.OpenFile(path, mode, 0o644)
			if errors.Is(err, fs.ErrExist) {
				return usage(fmt.Errorf("%s exists: name another file, or say --force to replace it", path))
			}
			if err != nil {
				return err
			}
			_, err = io.WriteString(f, spirt.DefaultJobFile())
			if err = errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("writing %s: %w", path, err)
			}
			_, err = fmt.Fprintf(stdout, "wrote %s; change it and run: spirt train %s\n", path, path)
			return err
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace the file if it exists")
	c.Flags().BoolVar(&schema, "schema", false, "write the JSON Schema of job files to standard output")
	return c
}
