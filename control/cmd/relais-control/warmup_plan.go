package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// defaultPreviewDays is how far a preview looks.
const defaultPreviewDays = 90

func (a *app) warmupPlanCommand() *cobra.Command {
	return group("plan", "List, show and preview the plans of the policy's section warmup", a.warmupPlanList(), a.warmupPlanShow(), a.warmupPlanPreview())
}

// planFlags say where plans come from.
type planFlags struct{ file *string }

func addPlanFlags(cmd *cobra.Command) planFlags {
	return planFlags{file: cmd.Flags().String("policy", "", "read the policy from this file or directory, without a server")}
}

const planSourceHelp = `Plans come from the policy in force; without a cli.toml on this machine from the
shipped policy; with --policy from files, as policy put reads them, and no server
is asked.`

// plans returns the section, and what it was read from.
func (a *app) plans(cmd *cobra.Command, f planFlags) (*policy.Warmup, error) {
	texts := map[string]string{}
	if *f.file != "" {
		var err error
		if texts, err = readSections([]string{*f.file}); err != nil {
			return nil, err
		}
	} else {
		c, err := a.client()
		switch {
		case err == nil:
			var p api.Policy
			if err := c.do(cmd.Context(), call{method: http.MethodGet, path: "/policy"}, &p); err != nil {
				return nil, err
			}
			for _, s := range p.Sections {
				if !s.Default {
					texts[s.Name] = s.Text
				}
			}
		case a.cliFile == "" && fault.Is(err, fault.NotFound):
			fmt.Fprintln(cmd.ErrOrStderr(), "no cli.toml here: these are the shipped plans")
		default:
			return nil, err
		}
	}
	doc, err := policy.Parse(texts)
	if err != nil {
		return nil, err
	}
	return &doc.Warmup, nil
}

func (a *app) plan(cmd *cobra.Command, f planFlags, name string) (*policy.Warmup, *policy.WarmupPlan, error) {
	section, err := a.plans(cmd, f)
	if err != nil {
		return nil, nil, err
	}
	p, ok := section.PlanNamed(name)
	if !ok {
		names := make([]string, len(section.Plan))
		for i := range section.Plan {
			names[i] = section.Plan[i].Name
		}
		return nil, nil, fault.Field("relais-control.warmup", name, "is not a plan: use one of %s, or add it to section warmup of the policy", strings.Join(names, ", "))
	}
	return section, p, nil
}

// planInfo is a plan as `plan list` and `plan show` print it.
type planInfo struct {
	Name        string      `json:"name"`
	Overflow    string      `json:"overflow"`
	HourPercent int         `json:"hour_percent"`
	FirstDay    int64       `json:"first_day"` // recipients, all classes
	Target      int64       `json:"target"`
	Tracks      []trackInfo `json:"tracks"`
}

type trackInfo struct {
	Class     string  `json:"class"`
	Stages    []int64 `json:"stages"` // quotas, until the target
	Target    int64   `json:"target"`
	LastStage int     `json:"last_stage"` // the first that allows the target
}

func newPlanInfo(p *policy.WarmupPlan) planInfo {
	plan := p.Plan()
	out := planInfo{Name: p.Name, Overflow: string(plan.Overflow), HourPercent: p.Hour()}
	for i := range plan.Tracks {
		t := &plan.Tracks[i]
		info := trackInfo{Class: t.Class, Target: t.Target, LastStage: t.Last()}
		for stage := 1; stage <= info.LastStage; stage++ {
			info.Stages = append(info.Stages, t.Quota(stage))
		}
		out.FirstDay += t.Quota(1)
		out.Target += t.Target
		out.Tracks = append(out.Tracks, info)
	}
	return out
}

func (a *app) warmupPlanList() *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List the plans", Args: cobra.NoArgs,
		Long:    "List the plans with how many recipients a day they begin and end with, all classes of providers together.\n\n" + planSourceHelp,
		Example: "  relais-control warmup plan list\n  relais-control warmup plan list --policy policy/ --json",
	}
	from := addPlanFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		section, err := a.plans(cmd, from)
		if err != nil {
			return err
		}
		infos, rows := []planInfo{}, [][]string{}
		for i := range section.Plan {
			p := newPlanInfo(&section.Plan[i])
			infos = append(infos, p)
			longest := 0
			for _, t := range p.Tracks {
				longest = max(longest, t.LastStage)
			}
			rows = append(rows, []string{p.Name, strconv.Itoa(len(p.Tracks)), fmt.Sprint(p.FirstDay), fmt.Sprint(p.Target), strconv.Itoa(longest), p.Overflow})
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), infos)
		}
		return printTable(cmd.OutOrStdout(), "NAME CLASSES FIRST-DAY TARGET DAYS-AT-LEAST OVERFLOW", rows)
	}
	return cmd
}

func (a *app) warmupPlanShow() *cobra.Command {
	cmd := &cobra.Command{
		Use: "show NAME", Short: "Show the quotas of a plan by stage", Args: cobra.ExactArgs(1),
		Long:    "Show how many recipients a day each class of providers is offered at each stage, until all are at their target.\n\n" + planSourceHelp,
		Example: "  relais-control warmup plan show standard\n  relais-control warmup plan show slow --policy warmup.toml",
	}
	from := addPlanFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, p, err := a.plan(cmd, from, args[0])
		if err != nil {
			return err
		}
		info := newPlanInfo(p)
		if a.json {
			return printJSON(cmd.OutOrStdout(), info)
		}
		header, rows, longest := "STAGE", [][]string{}, 0
		for _, t := range info.Tracks {
			header += " " + strings.ToUpper(t.Class)
			longest = max(longest, t.LastStage)
		}
		for stage := 1; stage <= longest; stage++ {
			row := []string{strconv.Itoa(stage)}
			for _, t := range info.Tracks {
				row = append(row, fmt.Sprint(t.Stages[min(stage, t.LastStage)-1]))
			}
			rows = append(rows, row)
		}
		return printTable(cmd.OutOrStdout(), header, rows)
	}
	return cmd
}

// forecast is what `plan preview` prints of a class.
type forecast struct {
	Class   string        `json:"class"`
	PerDay  int64         `json:"per_day"`           // recipients that come on the first day
	Carried int           `json:"carried,omitempty"` // first day from which on nothing waits or overflows
	Warm    int64         `json:"warm"`              // recipients that warm addresses of the pool took, all days
	Waiting int64         `json:"waiting"`           // the most that waited for the next day
	Stages  []stageDay    `json:"stages"`            // when each is reached
	Days    []forecastDay `json:"days"`
}

type stageDay struct {
	Stage int   `json:"stage"`
	Day   int   `json:"day"`
	Quota int64 `json:"quota"`
}

type forecastDay struct {
	Day     int   `json:"day"`
	Volume  int64 `json:"volume"`
	Quota   int64 `json:"quota"`
	Offered int64 `json:"offered"`
	Warm    int64 `json:"warm"`
	Waiting int64 `json:"waiting"`
}

func newForecast(f warmup.Forecast, perDay int64) forecast {
	out := forecast{Class: f.Class, PerDay: perDay, Carried: f.Carried}
	for _, r := range f.Reached {
		out.Stages = append(out.Stages, stageDay{r.Stage, r.Day, r.Quota})
	}
	for i, d := range f.Days {
		out.Warm += d.Warm
		out.Waiting = max(out.Waiting, d.Waiting)
		out.Days = append(out.Days, forecastDay{i + 1, d.Volume, d.Quota, d.Offered, d.Warm, d.Waiting})
	}
	return out
}

func (a *app) warmupPlanPreview() *cobra.Command {
	cmd := &cobra.Command{
		Use: "preview NAME --volume N/day", Short: "Play a plan against a volume", Args: cobra.ExactArgs(1),
		Long: `Play a plan against a volume in which every day passes: the day on which each
stage is reached, and what overflows where.

--volume is either one number, which is divided among the classes of providers
as the plan's targets are, or CLASS=N/day, given once for each class; a provider
that has no track of its own counts in "other". --warm is what warm addresses of
the pool can take more, by class or as one number, which is divided as the volume
is. --proven, likewise, is a volume that the subject has shown already: it enters at
the last stage that allows no more.

` + planSourceHelp,
		Example: `  relais-control warmup plan preview standard --volume 200000/day
  relais-control warmup plan preview standard --volume google=50000/day --volume orange=8000/day --warm 20000/day
  relais-control warmup plan preview slow --policy warmup.toml --volume 5000/day --growth 10 --days 30 --json`,
	}
	from := addPlanFlags(cmd)
	volume := cmd.Flags().StringArray("volume", nil, "recipients a day: N/day, or CLASS=N/day for each class")
	warm := cmd.Flags().StringArray("warm", nil, "what warm addresses of the pool take: N/day, or CLASS=N/day")
	proven := cmd.Flags().StringArray("proven", nil, "what the subject has proved: N/day, or CLASS=N/day")
	growth := cmd.Flags().Int("growth", 0, "percent by which the volume grows a week")
	days := cmd.Flags().Int("days", defaultPreviewDays, "how many days to play")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(*volume) == 0 {
			return usagef("--volume is missing: give recipients a day, such as --volume 200000/day")
		}
		section, named, err := a.plan(cmd, from, args[0])
		if err != nil {
			return err
		}
		plan := named.Plan()
		targets := map[string]int64{}
		for i := range plan.Tracks {
			targets[plan.Tracks[i].Class] = plan.Tracks[i].Target
		}
		perDay, err := classAmounts(section, named, &plan, "volume", *volume, targets)
		if err != nil {
			return err
		}
		amounts := map[string]map[string]int64{}
		for name, texts := range map[string][]string{"warm": *warm, "proven": *proven} {
			if amounts[name], err = classAmounts(section, named, &plan, name, texts, perDay); err != nil {
				return err
			}
		}
		var volumes []warmup.Volume
		for i := range plan.Tracks {
			t := &plan.Tracks[i]
			if n := perDay[t.Class]; n > 0 {
				volumes = append(volumes, warmup.Volume{Class: t.Class, PerDay: n, Growth: *growth, Stage: t.Enter(amounts["proven"][t.Class]), Warm: amounts["warm"][t.Class]})
			}
		}
		if len(volumes) == 0 {
			return usagef("--volume is 0: give the recipients a day that are to be sent, such as --volume 200000/day")
		}
		played, err := warmup.Preview(&plan, volumes, *days)
		if err != nil {
			return err
		}
		out := []forecast{}
		for i, f := range played {
			out = append(out, newForecast(f, volumes[i].PerDay))
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), out)
		}
		return printForecasts(cmd.OutOrStdout(), out)
	}
	return cmd
}

// classAmounts reads N/day, divided in proportion to parts, or CLASS=N/day.
func classAmounts(section *policy.Warmup, named *policy.WarmupPlan, plan *warmup.Plan, flag string, texts []string, parts map[string]int64) (map[string]int64, error) {
	out := map[string]int64{}
	for _, text := range texts {
		class, amount, byClass := strings.Cut(text, "=")
		if !byClass {
			class, amount = "", text
		}
		n, err := perDay(amount)
		if err != nil {
			return nil, usagef("--%s %s: %s", flag, text, err)
		}
		if byClass {
			out[section.ClassOf(named, class)] += n
			continue
		}
		if len(texts) > 1 {
			return nil, usagef("--%s %s is for all classes: give it alone, or write CLASS=N/day each time", flag, text)
		}
		all, last := int64(0), ""
		for i := range plan.Tracks {
			if c := plan.Tracks[i].Class; parts[c] > 0 {
				all, last = all+parts[c], c
			}
		}
		left := n
		for i := range plan.Tracks {
			c := plan.Tracks[i].Class
			if parts[c] == 0 {
				continue
			}
			out[c] = n * parts[c] / all
			if c == last {
				out[c] = left
			}
			left -= out[c]
		}
	}
	return out, nil
}

// perDay reads "N/day" or "N".
func perDay(text string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSuffix(text, "/day"), 10, 64)
	if err != nil || n < 0 || n > warmup.MaxQuota {
		return 0, errors.New("write recipients a day, 0 to " + strconv.Itoa(warmup.MaxQuota) + ", such as 200000/day")
	}
	return n, nil
}

func printForecasts(w io.Writer, forecasts []forecast) error {
	for i, f := range forecasts {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s, %d a day: ", f.Class, f.PerDay)
		switch {
		case f.Carried == 1:
			fmt.Fprint(w, "all of it goes from the first day on")
		case f.Carried > 0:
			fmt.Fprintf(w, "all of it goes from day %d on", f.Carried)
		default:
			fmt.Fprintf(w, "never all of it within %d days", len(f.Days))
		}
		if f.Warm > 0 {
			fmt.Fprintf(w, "; %d recipients go over warm addresses of the pool", f.Warm)
		}
		if f.Waiting > 0 {
			fmt.Fprintf(w, "; up to %d wait for another day", f.Waiting)
		}
		fmt.Fprintln(w)
		rows := make([][]string, 0, len(f.Stages))
		for _, s := range f.Stages {
			d := f.Days[s.Day-1]
			rows = append(rows, []string{strconv.Itoa(s.Stage), strconv.Itoa(s.Day), fmt.Sprint(d.Quota), fmt.Sprint(d.Offered), fmt.Sprint(d.Warm), fmt.Sprint(d.Waiting)})
		}
		if err := printTable(w, "STAGE FROM-DAY QUOTA OFFERED WARM WAITING", rows); err != nil {
			return err
		}
	}
	return nil
}
