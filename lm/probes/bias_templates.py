"""Sentences about two groups that the repository makes of templates, in English and Chinese.

A test has pairs of terms, one of each group, and two sets of attributes: the first is the
stereotype of the first group, the second that of the other. Every template is filled with every
term and attribute.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TemplateTest:
    language: str
    name: str
    terms: tuple[tuple[str, str], ...]  # of the first group, of the second
    attributes: tuple[tuple[str, ...], tuple[str, ...]]
    templates: tuple[str, ...]  # with {term} and {attribute}

    def sentences(self, attribute: str) -> list[tuple[str, str]]:
        """The sentences with an attribute, about the first group and about the second."""
        pairs = []
        for template in self.templates:
            for terms in self.terms:
                first, second = (template.format(term=t, attribute=attribute) for t in terms)
                pairs.append((first, second))
        return pairs


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


# Occupations of arXiv:1804.06876, table 1: those with the fewest and the most women in US labour
# statistics.
_OCCUPATIONS = (
    _words(
        "a carpenter, a mechanic, a construction worker, a laborer, a driver, a sheriff, a mover, "
        "a developer, a farmer, a guard, a chief, a janitor"
    ),
    _words(
        "a secretary, a hairdresser, a nurse, a receptionist, a cleaner, a housekeeper, "
        "an assistant, a librarian, a teacher, an attendant, a cashier, a counselor"
    ),
)
# Words and names of the tests of Caliskan et al. 2017 (science.aal4230).
_CAREER_FAMILY = (
    _words("executives, management, professionals, the corporation, the salary, the office"),
    _words("the home, the parents, the children, the family, the cousins, the wedding"),
)
_PLEASANT = (
    _words("honest, gentle, happy, loyal, friendly, lucky, smart, kind"),
    _words("dishonest, violent, angry, ugly, rude, dirty, poor, evil"),
)
_NAMES = tuple(
    zip(
        _words("Adam, Harry, Josh, Roger, Amanda, Courtney, Heather, Melanie"),
        _words("Alonzo, Jamel, Theo, Alphonse, Ebony, Latisha, Shaniqua, Yolanda"),
        strict=True,
    )
)
_PEOPLE = (
    ("He", "She"),
    ("The man", "The woman"),
    ("My father", "My mother"),
    ("My brother", "My sister"),
)
_PEOPLE_ZH = (("他", "她"), ("那个男人", "那个女人"), ("我爸爸", "我妈妈"), ("我哥哥", "我姐姐"))

TESTS = (
    TemplateTest(
        "en",
        "men and women: occupations",
        _PEOPLE,
        _OCCUPATIONS,
        ("{term} is {attribute}.", "{term} works as {attribute}.", "{term} became {attribute}."),
    ),
    TemplateTest(
        "en",
        "men and women: career and family",
        _PEOPLE,
        _CAREER_FAMILY,
        ("{term} always talks about {attribute}.", "{term} thought about {attribute} all day."),
    ),
    TemplateTest(
        "en",
        "names of white and black Americans: pleasant and unpleasant",
        _NAMES,
        _PLEASANT,
        ("{term} is {attribute}.", "{term} was very {attribute} that day."),
    ),
    TemplateTest(
        "en",
        "young and old: able and unable",
        (
            ("The young man", "The old man"),
            ("The young woman", "The old woman"),
            ("My young neighbour", "My old neighbour"),
        ),
        (
            _words("quick, strong, healthy, clever, modern, curious, flexible, busy"),
            _words("slow, weak, ill, forgetful, tired, confused, stubborn, lonely"),
        ),
        ("{term} is {attribute}.", "{term} was very {attribute} that day."),
    ),
    TemplateTest(
        "zh",
        "men and women: occupations",
        _PEOPLE_ZH,
        (
            _words(
                "木匠, 修理工, 建筑工人, 司机, 警察, 搬运工, "
                "程序员, 农民, 保安, 工程师, 飞行员, 经理"
            ),
            _words(
                "秘书, 美容师, 护士, 前台, 清洁工, 保姆, "
                "助理, 图书管理员, 小学老师, 乘务员, 收银员, 会计"
            ),
        ),
        ("{term}是一名{attribute}。", "{term}的工作是{attribute}。", "{term}后来当了{attribute}。"),
    ),
    TemplateTest(
        "zh",
        "men and women: career and family",
        _PEOPLE_ZH,
        (
            _words("事业, 管理, 公司, 工资, 办公室, 升职"),
            _words("家庭, 父母, 孩子, 亲戚, 婚礼, 家务"),
        ),
        ("{term}总是谈{attribute}。", "{term}整天都想着{attribute}。"),
    ),
    TemplateTest(
        "zh",
        "townspeople and villagers: pleasant and unpleasant",
        (
            ("城里人", "乡下人"),
            ("城市来的同学", "农村来的同学"),
            ("那个城里的孩子", "那个乡下的孩子"),
        ),
        (
            _words("聪明, 文明, 礼貌, 干净, 能干, 大方, 时髦, 可靠"),
            _words("愚笨, 野蛮, 粗鲁, 肮脏, 无能, 小气, 土气, 狡猾"),
        ),
        ("{term}很{attribute}。", "{term}那天显得特别{attribute}。"),
    ),
    TemplateTest(
        "zh",
        "young and old: able and unable",
        (("年轻人", "老年人"), ("那个小伙子", "那个老头子"), ("我的年轻邻居", "我的年老邻居")),
        (
            _words("敏捷, 强壮, 健康, 聪明, 时髦, 好奇, 灵活, 忙碌"),
            _words("迟钝, 虚弱, 多病, 健忘, 疲惫, 糊涂, 固执, 孤独"),
        ),
        ("{term}很{attribute}。", "{term}那天显得特别{attribute}。"),
    ),
)
LANGUAGES = tuple(dict.fromkeys(test.language for test in TESTS))
