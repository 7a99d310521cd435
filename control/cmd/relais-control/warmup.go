package main

import "github.com/spf13/cobra"

func (a *app) warmupCommand() *cobra.Command {
	plan := a.warmupPlanCommand()
	requireSubcommand(plan)
	return group("warmup", "Raise the volume of new addresses, pools and domains day by day", a.warmupList(), a.warmupShow(), a.warmupStart(),
		a.warmupHold(false), a.warmupHold(true), a.warmupStepBack(), a.warmupStop(), a.warmupRoll(), plan)
}
