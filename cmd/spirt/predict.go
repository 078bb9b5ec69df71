package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
)

func predictCommand(stdout io.Writer) *cobra.Command {
	dir, invert := "", "auto"
	top := 3
	var asJSON bool
	c := &cobra.Command{
		Use:   "predict RUN IMAGE|INDEX...",
		Short: "Classify images with the model of a run",
		Long: "Predict prints the class of PNG or JPEG files, or of test samples by their index from 0, with\n" +
			"its probability and the runners-up. A picture is fitted into the model's input; one with a bright\n" +
			"border is inverted where the training images have a dark one. A file whose name is a number is\n" +
			"given as ./7.",
		Example: "  spirt predict runs/mine seven.png\n  spirt predict runs/mine 0 1 2\n  spirt predict runs/mine photo.jpg --invert no --json",
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if dir == "" && len(args) > 0 {
				dir, args = args[0], args[1:]
			}
			switch {
			case len(args) == 0:
				return usage(errors.New("predict needs a run folder and images, or indices of test samples (see `spirt predict --help`)"))
			case invert != "auto" && invert != "yes" && invert != "no":
				return usage(fmt.Errorf("--invert %.20q: take auto, yes or no", invert))
			case top < 1:
				return usage(fmt.Errorf("--top %d: take 1 or more", top))
			}
			p, err := spirt.OpenPredictor(dir)
			if err != nil {
				return err
			}
			for _, a := range args {
				var out spirt.Prediction
				if index, nerr := strconv.Atoi(a); nerr == nil {
					out, err = p.Sample(index)
				} else {
					out, err = p.File(a, spirt.Invert(invert))
				}
				if err != nil {
					return err
				}
				if asJSON {
					if err := json.NewEncoder(stdout).Encode(out); err != nil {
						return err
					}
					continue
				}
				text := fmt.Sprintf("%s: %d (%.1f %%)", clean(out.Image), out.Class, 100*out.Probability)
				for _, class := range out.Top(top)[1:] {
					text += fmt.Sprintf(", %d (%.1f %%)", class, 100*out.Probabilities[class])
				}
				if out.Label != nil {
					verdict := "right"
					if *out.Label != out.Class {
						verdict = "wrong"
					}
					text += fmt.Sprintf("; labelled %d: %s", *out.Label, verdict)
				}
				if _, err := fmt.Fprintln(stdout, text); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&dir, "run", "", "run folder, in place of the first argument")
	c.Flags().StringVar(&invert, "invert", invert, "invert pictures: auto, yes or no")
	c.Flags().IntVar(&top, "top", top, "how many classes to print of each")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object for each image")
	return c
}
